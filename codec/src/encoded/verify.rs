//! The proof against the source.

use super::EncodedTensor;
use super::encode::scale_bytes;
use super::header::ScaleKind;
use crate::block::{BLOCK_ROWS, Params};
use crate::checkpoint::Tensor;
use crate::cpu::Cpu;
use crate::error::Result;
use crate::format::{Coder, Format, ScaleMode};
use crate::quantize::{INT8_MAX, matrix_shape, quantize, quantize_to_step, quantize_to_trellis, read_row, row_steps};
use crate::trellis;
use rayon::prelude::*;

impl EncodedTensor {
    /// Quantizes `source` anew and compares every code, scale and dtype: none if all are equal, else what differs first.
    ///
    /// # Errors
    /// A source that cannot be quantized, or a payload that does not decode.
    pub fn verify_source(&self, source: &Tensor, cpu: Cpu) -> Result<Option<String>> {
        let (n_rows, n_cols) = matrix_shape(source)?;
        if let Some(difference) = self.kind_difference(source, n_rows, n_cols) {
            return Ok(Some(difference));
        }
        let mode = if self.header.scale_kind == ScaleKind::Tensor { ScaleMode::Tensor } else { ScaleMode::Channel };
        let raw_bits = (self.header.coder == Coder::Rans).then_some(self.header.params.raw_bits);
        let expected = match self.header.format {
            Format::Rate => match self.header.params {
                Params { trellis: true, raw_bits, block_cols, .. } => {
                    let block_cols = block_cols as usize;
                    quantize_to_trellis(source, self.header.step, raw_bits, block_cols)?.decoded(n_cols, block_cols)
                }
                _ => quantize_to_step(source, self.header.step, raw_bits)?,
            },
            format => quantize(source, format, mode)?,
        };
        if self.section(&self.sections.scales) != scale_bytes(&expected.scales) {
            return Ok(Some("the scales are not those that the quantizer yields".into()));
        }
        let codes = self.decode_codes(cpu)?;
        if codes == expected.codes {
            return Ok(None);
        }
        let at = (0..codes.len()).find(|&i| codes.get(i) != expected.codes.get(i)).unwrap_or(0);
        Ok(Some(format!(
            "the code at row {}, column {} is {:#x}, the quantizer yields {:#x}",
            at / n_cols,
            at % n_cols,
            codes.get(at),
            expected.codes.get(at)
        )))
    }
}

/// What stays provable of a matrix that was encoded with error feedback, whose codes follow from more than the matrix.
impl EncodedTensor {
    /// Compares dtype and shape with `source`, the scales with the grid that the header's step yields for it, and the relative error,
    /// computed anew, with the header's: none if all agree, else what differs first.
    ///
    /// # Errors
    /// A source that cannot be quantized, or a payload that does not decode.
    pub fn verify_calibrated(&self, source: &Tensor, cpu: Cpu) -> Result<Option<String>> {
        let (n_rows, n_cols) = matrix_shape(source)?;
        if let Some(difference) = self.kind_difference(source, n_rows, n_cols) {
            return Ok(Some(difference));
        }
        let step = self.header.step;
        let steps =
            row_steps(source, n_cols, step, if self.header.params.trellis { trellis::MAX_STEPS } else { INT8_MAX })?;
        let fit = self.scale(0) / steps[0];
        let is_on_grid = |row: usize| (self.scale(row) / (fit * steps[row]) - 1.0).abs() < 1e-5;
        if !(0.49..2.01).contains(&fit) || !(0..n_rows).all(is_on_grid) {
            return Ok(Some(format!("its scales are not those of a grid of step {step}")));
        }
        let row_bytes = source.data.len() / n_rows;
        let errors = (0..n_rows.div_ceil(BLOCK_ROWS))
            .into_par_iter()
            .map(|i| {
                let rows = i * BLOCK_ROWS..n_rows.min((i + 1) * BLOCK_ROWS);
                let (mut found, mut expected) = (vec![0f32; rows.len() * n_cols], vec![0f32; rows.len() * n_cols]);
                self.decode_rows(cpu, rows.clone(), &mut found)?;
                read_row(source.dtype, &source.data[rows.start * row_bytes..rows.end * row_bytes], &mut expected);
                Ok(found.iter().zip(&expected).fold([0f64; 2], |[error, weight], (found, w)| {
                    let (found, w) = (f64::from(*found), f64::from(*w));
                    [error + (w - found) * (w - found), weight + w * w]
                }))
            })
            .collect::<Result<Vec<_>>>()?;
        let [error, weight] = errors.iter().fold([0f64; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
        let error = if weight > 0.0 { (error / weight).sqrt() } else { error };
        let recorded = f64::from(self.header.relative_error);
        if (error - recorded).abs() > 1e-4 * recorded + 1e-6 {
            return Ok(Some(format!("its relative error from the source is {error:.6}, not {recorded:.6} as it says")));
        }
        Ok(None)
    }

    fn kind_difference(&self, source: &Tensor, n_rows: usize, n_cols: usize) -> Option<String> {
        if (n_rows, n_cols) != (self.n_rows(), self.n_cols()) {
            let (rows, cols) = (self.n_rows(), self.n_cols());
            return Some(format!("the shape is {rows} × {cols}, the source's is {n_rows} × {n_cols}"));
        }
        let (found, expected) = (self.header.source_dtype, source.dtype);
        (found != expected).then(|| format!("it was encoded from {found:?}, the source is {expected:?}"))
    }
}
