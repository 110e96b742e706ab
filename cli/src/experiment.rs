//! What `compare` and `sweep` share: forms of a model, made in a temporary directory, and their quality beside the model itself.

use crate::model::{Load, TALE, read_text};
use crate::output::{self, Bar, Error, Unit};
use codecllm_codec::archive::{self, CompressOptions, Layers, RateTarget};
use codecllm_codec::{Checkpoint, EncodeOptions, Format, ScaleMode};
use codecllm_engine::evaluate::{DEFAULT_WINDOW, text_tokens};
use codecllm_engine::{Model, Tokenizer, evaluate};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A format with its setting, as the user spells it: `bf16`, `int8`, `int8:tensor`, `fp8`, `rate:4.5`, `rate:4.5:trellis`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Variant {
    pub format: Format,
    pub scale: ScaleMode,
    /// `rate`: bits per weight.
    pub bits: Option<f64>,
    /// `rate`: codes of a trellis.
    pub trellis: bool,
}

impl FromStr for Variant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (format, setting) = text.split_once(':').map_or((text, None), |(format, setting)| (format, Some(setting)));
        let format: Format = format.parse().map_err(|e: codecllm_codec::Error| e.to_string())?;
        let mut variant = Self { format, scale: ScaleMode::Channel, bits: None, trellis: false };
        match (format, setting) {
            (Format::Rate, Some(setting)) => {
                let bits = setting.strip_suffix(":trellis");
                variant.trellis = bits.is_some();
                let bits = bits.unwrap_or(setting);
                let bits = bits.parse().ok().filter(|bits: &f64| bits.is_finite() && *bits > 0.0);
                variant.bits = Some(bits.ok_or_else(|| format!("`{text}`: expected bits per weight, as in rate:4.5"))?);
            }
            (Format::Rate, None) => return Err("`rate` needs its bits per weight, as in rate:4.5".into()),
            (Format::Int8 | Format::Fp8, Some(scale)) => {
                variant.scale = scale.parse().map_err(|e: codecllm_codec::Error| e.to_string())?;
            }
            (Format::Bf16, Some(_)) => return Err(format!("`{text}`: bf16 has no setting")),
            (_, None) => {}
        }
        Ok(variant)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.bits, self.scale) {
            (Some(bits), _) => write!(f, "{}:{bits}{}", self.format, if self.trellis { ":trellis" } else { "" }),
            (None, ScaleMode::Tensor) => write!(f, "{}:tensor", self.format),
            (None, ScaleMode::Channel) => write!(f, "{}", self.format),
        }
    }
}

impl Variant {
    /// How to compress a model so. Bits are those of the selected matrices; where all are selected, of the whole model.
    pub fn options(&self, layers: &Layers) -> CompressOptions {
        let target = if matches!(layers, Layers::All) { RateTarget::Bits } else { RateTarget::MatrixBits };
        CompressOptions {
            encode: EncodeOptions {
                format: self.format,
                scale: self.scale,
                trellis: self.trellis,
                ..EncodeOptions::default()
            },
            rate: self.bits.map(target),
            layers: layers.clone(),
            ..CompressOptions::default()
        }
    }
}

/// The text that quality is measured on.
#[derive(clap::Args)]
pub struct TextArgs {
    /// UTF-8 text that quality is measured on [default: a short tale that is part of this program]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Only the first N tokens of the text
    #[arg(long, value_name = "N", default_value_t = 4096)]
    tokens: usize,
}

impl TextArgs {
    /// The text's tokens.
    pub fn read(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        let text = match &self.text {
            Some(path) => read_text(path)?,
            None => TALE.into(),
        };
        let mut tokens = text_tokens(tokenizer, &text)?;
        tokens.truncate(self.tokens);
        Ok(tokens)
    }
}

/// How a form of the model predicts a text, beside the model itself.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Quality {
    pub perplexity: f64,
    pub baseline_perplexity: f64,
    /// Mean KL divergence from the baseline, nats per token.
    pub kld_mean: f64,
    /// Share of predictions, 0 to 1, whose likeliest token is the baseline's.
    pub top1_equal: f64,
}

/// The model that others are compared with, and the text.
pub struct Baseline<'a, L: Load> {
    pub machine: &'a L,
    pub model: Model<L::Backend>,
    pub tokens: Vec<u32>,
}

impl<L: Load> Baseline<'_, L> {
    /// Measures `model`.
    pub fn quality(&self, model: &Model<L::Backend>) -> Result<Quality, Error> {
        let bar = output::steps_bar("evaluating", "tokens", self.tokens.len());
        let window = DEFAULT_WINDOW.min(model.config().max_positions);
        let evaluation = evaluate(model, Some(&self.model), &self.tokens, window, output::advance(&bar))?;
        bar.finish_and_clear();
        check_stopped()?;
        let comparison = evaluation.comparison.ok_or("the evaluation has no comparison")?;
        Ok(Quality {
            perplexity: evaluation.perplexity,
            baseline_perplexity: comparison.baseline_perplexity,
            kld_mean: comparison.kld_mean,
            top1_equal: comparison.top1_equal,
        })
    }
}

/// An archive in a temporary directory (`TMPDIR` says where), which is removed with this.
pub struct Trial {
    dir: tempfile::TempDir,
    /// Bits a weight of the whole model, everything counted.
    pub model_bits: f64,
    /// Bits a weight of the matrices that are compressed, all of their metadata counted.
    pub bits: f64,
    pub n_encoded: usize,
}

impl Trial {
    /// Compresses `source`.
    pub fn new(source: &Path, options: &CompressOptions) -> Result<Self, Error> {
        let dir = tempfile::Builder::new().prefix("codecllm-trial-").tempdir()?;
        let path = dir.path().join("archive");
        let bar = Bar::new("compressing", Unit::Bytes);
        let summary = archive::compress(source, &path, options, &bar)?;
        drop(bar);
        let encoded = Checkpoint::open(&path)?;
        let original = Checkpoint::open(source)?;
        let (mut n_bytes, mut n_weights) = (0, 0);
        for name in options.layers.select(&original)? {
            n_bytes += encoded.info(name).map_or(0, |t| t.n_bytes);
            n_weights += original.info(name).map_or(0, |t| t.n_elements());
        }
        Ok(Self {
            dir,
            model_bits: 8.0 * summary.archive_bytes as f64 / summary.n_weights.max(1) as f64,
            bits: 8.0 * n_bytes as f64 / n_weights.max(1) as f64,
            n_encoded: summary.n_encoded,
        })
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("archive")
    }
}

/// Ends a command that the user has stopped.
pub fn check_stopped() -> Result<(), Error> {
    match output::is_stopped() {
        true => Err(codecllm_codec::Error::Interrupted.into()),
        false => Ok(()),
    }
}

/// Lines of a table for people, columns aligned: the first to the left, the others to the right.
pub fn align(headers: &[&str], rows: &[Vec<String>]) -> String {
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.chars().count());
        cells.chain([headers[i].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headers.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cells = cells.iter().zip(&widths).enumerate();
        let cells = cells.map(|(i, (cell, w))| if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    let rule = "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1));
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    [line(headers.to_vec()), rule].into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_parsed_or_explained() {
        for text in ["bf16", "int8", "int8:tensor", "fp8", "rate:4.5", "rate:3"] {
            assert_eq!(text.parse::<Variant>().unwrap().to_string(), text);
        }
        for (bad, said) in [
            ("rate", "rate:4.5"),
            ("rate:x", "rate:4.5"),
            ("rate:-1", "rate:4.5"),
            ("int9", "int8"),
            ("int8:row", "channel"),
            ("bf16:1", "no setting"),
        ] {
            let error = bad.parse::<Variant>().unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn tables_are_aligned() {
        let rows = vec![vec!["a".into(), "1.5".into()], vec!["long".into(), "10".into()]];
        assert_eq!(align(&["name", "n"], &rows), "name    n\n---------\na     1.5\nlong   10");
    }
}
