//! Draws of tokens on a GPU: the kernels in `engine/cuda/sample.cu`, and their memory. Nothing but the token comes back.

use super::code;
use super::device::{Device, Grid};
use super::host::Pinned;
use crate::error::{Error, Result};
use crate::sampler::Draw;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr};

/// As in sample.cu.
const THREADS: u32 = 512;
const SLICE: u32 = 4 * THREADS;
const BINS: usize = 2048;
const MAX_SLICES: usize = 2048;
/// Launches that find a cut: its bits in so many parts.
const LEVELS: u32 = 5;
/// Words of `State`.
const STATE_WORDS: usize = 6;
/// Threads of a block that goes over the tokens seen.
const SEEN_THREADS: u32 = 256;

/// `Sample` in sample.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    logits: CUdeviceptr,
    seen: CUdeviceptr,
    state: CUdeviceptr,
    counts: CUdeviceptr,
    weights: CUdeviceptr,
    sums: CUdeviceptr,
    choice_host: CUdeviceptr,
    scale: f64,
    top_p: f64,
    min_weight: u64,
    random: u64,
    vocab: u32,
    n_seen: u32,
    top_k: u32,
    penalty: f32,
    level: u32,
    by_weight: u32,
}

/// The kernels, loaded.
pub(super) struct SampleKernels {
    penalize: CudaFunction,
    largest: CudaFunction,
    narrow: CudaFunction,
    draw: CudaFunction,
}

/// What the launches of a draw hand on.
pub(super) struct DrawState {
    state: CudaSlice<u64>,
    counts: CudaSlice<u32>,
    weights: CudaSlice<u64>,
    sums: CudaSlice<u64>,
    /// Tokens seen, as the GPU reads them; grows with a text.
    seen_host: Option<Pinned>,
}

impl DrawState {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            state: device.zeros(STATE_WORDS)?,
            counts: device.zeros(BINS)?,
            weights: device.zeros(BINS)?,
            sums: device.zeros(MAX_SLICES)?,
            seen_host: None,
        })
    }

    /// Puts the tokens seen where the GPU reads them. It must be through with the last draw.
    fn write_seen(&mut self, device: &Device, seen: &[u32]) -> Result<CUdeviceptr> {
        let bytes: &[u8] = bytemuck::cast_slice(seen);
        let pinned = match &mut self.seen_host {
            Some(pinned) if pinned.len() >= bytes.len() => pinned,
            seen_host => seen_host.insert(Pinned::new(device, bytes.len().next_power_of_two().max(1 << 12))?),
        };
        pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Ok(pinned.address())
    }
}

impl SampleKernels {
    pub fn load(device: &Device) -> Result<Self> {
        let module = device.load(&code::SAMPLE)?;
        let kernel = |name| device.kernel(&module, name, 0);
        Ok(Self {
            penalize: kernel("penalize")?,
            largest: kernel("largest")?,
            narrow: kernel("narrow")?,
            draw: kernel("draw")?,
        })
    }

    /// Issues the launches of a draw from the first `vocab` values of `logits`. The token goes to `choice_host`, with the bits of
    /// the largest logit behind it. The stream is at rest.
    pub fn issue(
        &self,
        device: &Device,
        state: &mut DrawState,
        logits: &CudaSlice<f32>,
        vocab: usize,
        choice_host: &Pinned,
        draw: &Draw,
    ) -> Result<()> {
        let n_slices = vocab.div_ceil(SLICE as usize);
        assert!(logits.len() >= vocab && choice_host.len() >= 8, "logits and choice have their room");
        if vocab == 0 || n_slices > MAX_SLICES {
            return Err(Error::unsupported(
                "--device cuda",
                format!("the vocabulary has {vocab} tokens; the GPU draws from 1 to {}", MAX_SLICES * SLICE as usize),
            ));
        }
        let stream = device.stream();
        let mut params = Params {
            logits: logits.device_ptr(stream).0,
            seen: if draw.seen.is_empty() { 0 } else { state.write_seen(device, &draw.seen)? },
            state: state.state.device_ptr(stream).0,
            counts: state.counts.device_ptr(stream).0,
            weights: state.weights.device_ptr(stream).0,
            sums: state.sums.device_ptr(stream).0,
            choice_host: choice_host.address(),
            scale: draw.scale.unwrap_or(0.0),
            top_p: draw.top_p,
            min_weight: draw.min_weight,
            random: draw.random,
            vocab: vocab as u32,
            n_seen: draw.seen.len() as u32,
            top_k: draw.top_k,
            penalty: draw.penalty,
            level: 0,
            by_weight: 0,
        };
        let slices = Grid { blocks: (n_slices as u32, 1, 1), threads: THREADS, shared_bytes: 0 };
        if params.n_seen > 0 {
            let blocks = (params.n_seen.div_ceil(SEEN_THREADS), 1, 1);
            let grid = Grid { blocks, threads: SEEN_THREADS, shared_bytes: 0 };
            // SAFETY: the structure is the kernels'; its pointers have the room that they take, as was checked or allocated.
            unsafe { device.launch(&self.penalize, grid, &params)? };
        }
        // SAFETY: as above.
        unsafe { device.launch(&self.largest, slices, &params)? };
        if draw.scale.is_none() {
            return Ok(());
        }
        let has_top_k = draw.top_k > 0 && draw.top_k < params.vocab;
        for (by_weight, is_on) in [(0, has_top_k), (1, draw.top_p < 1.0)] {
            for level in (0..LEVELS).filter(|_| is_on) {
                (params.level, params.by_weight) = (level, by_weight);
                // SAFETY: as above.
                unsafe { device.launch(&self.narrow, slices, &params)? };
            }
        }
        // SAFETY: as above.
        unsafe { device.launch(&self.draw, slices, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{Sampler, SamplingOptions};
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use std::io::Write;

    fn gpu() -> Option<(Device, SampleKernels)> {
        match Device::open(0).and_then(|device| SampleKernels::load(&device).map(|kernels| (device, kernels))) {
            Ok(gpu) => Some(gpu),
            Err(e) => {
                assert!(std::env::var_os("CODECLLM_REQUIRE_CUDA").is_none_or(|v| v != "1"), "{e}");
                let _ = writeln!(std::io::stderr(), "SKIPPED: {e}");
                None
            }
        }
    }

    /// Logits of several kinds: bell-shaped, few values many times, all equal, far apart, with infinities.
    fn logits(kind: usize, vocab: usize, rng: &mut SmallRng) -> Vec<f32> {
        let mut bell = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        let mut logits: Vec<f32> = match kind {
            0 => (0..vocab).map(|_| 3.0 * bell()).collect(),
            1 => (0..vocab).map(|_| (4.0 * bell()).round() / 4.0).collect(),
            2 => vec![-0.0; vocab],
            3 => (0..vocab).map(|_| 1e30 * bell()).collect(),
            _ => (0..vocab).map(|_| if bell() < 0.0 { f32::NEG_INFINITY } else { bell() }).collect(),
        };
        if kind == 2 {
            logits.iter_mut().step_by(3).for_each(|logit| *logit = 0.0);
        }
        logits
    }

    #[test]
    fn draws_are_those_of_the_reference() {
        let Some((device, kernels)) = gpu() else { return };
        let stream = device.stream();
        let mut state = DrawState::new(&device).unwrap();
        let choice = Pinned::new(&device, 8).unwrap();
        let mut rng = SmallRng::seed_from_u64(5);
        let base = SamplingOptions { temperature: 0.8, ..Default::default() };
        let options = [
            base,
            SamplingOptions { top_k: 40, ..base },
            SamplingOptions { top_k: 1, ..base },
            SamplingOptions { top_p: 0.95, ..base },
            SamplingOptions { top_p: 1e-6, ..base },
            SamplingOptions { top_k: 1000, top_p: 0.5, ..base },
            SamplingOptions { top_k: 60, top_p: 0.9, min_p: 0.05, temperature: 2.0, ..base },
            SamplingOptions { min_p: 0.3, repetition_penalty: 1.3, ..base },
            SamplingOptions { temperature: 0.0, repetition_penalty: 1.3, ..base },
            SamplingOptions { temperature: 1e-30, ..base },
        ];
        for vocab in [1, 3, 2047, 2049, 32000, 128_256, 300_001] {
            for (i, options) in options.iter().enumerate() {
                let mut sampler = Sampler::new(SamplingOptions { seed: i as u64, ..*options }).unwrap();
                for kind in 0..5 {
                    let values = logits(kind, vocab, &mut rng);
                    let history: Vec<u32> = (0..700).map(|_| rng.random_range(0..vocab as u32 + 2)).collect();
                    for _ in 0..4 {
                        let draw = sampler.draw(&history);
                        let on_device = stream.clone_htod(&values).unwrap();
                        kernels.issue(&device, &mut state, &on_device, vocab, &choice, &draw).unwrap();
                        device.synchronize().unwrap();
                        let expected = draw.choose(&mut values.clone()).unwrap();
                        assert_eq!(choice.word(0), expected, "{vocab} logits of kind {kind}: {draw:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_is_found() {
        let Some((device, kernels)) = gpu() else { return };
        let mut state = DrawState::new(&device).unwrap();
        let choice = Pinned::new(&device, 8).unwrap();
        let draw = Sampler::new(SamplingOptions { temperature: 1.0, ..Default::default() }).unwrap().draw(&[]);
        for (value, token) in [(f32::NAN, 4000), (-f32::NAN, 4000), (f32::INFINITY, 4000)] {
            let mut values = vec![1.0f32; 5000];
            (values[4000], values[4500]) = (value, value);
            let on_device = device.stream().clone_htod(&values).unwrap();
            kernels.issue(&device, &mut state, &on_device, 5000, &choice, &draw).unwrap();
            device.synchronize().unwrap();
            assert_eq!((choice.word(0), f32::from_bits(choice.word(1)).is_nan()), (token, value.is_nan()));
            // The next draw begins anew.
            let on_device = device.stream().clone_htod(&[0.0f32, 50.0]).unwrap();
            kernels.issue(&device, &mut state, &on_device, 2, &choice, &draw).unwrap();
            device.synchronize().unwrap();
            assert_eq!(choice.word(0), 1);
        }
    }

    /// Times on the device machine; prints a table.
    #[test]
    #[ignore = "a bench"]
    fn bench() {
        let (device, kernels) = gpu().unwrap();
        let mut state = DrawState::new(&device).unwrap();
        let choice = Pinned::new(&device, 8).unwrap();
        let vocab = 128_256;
        let values = logits(0, vocab, &mut SmallRng::seed_from_u64(1));
        let on_device = device.stream().clone_htod(&values).unwrap();
        let base = SamplingOptions { temperature: 0.8, ..Default::default() };
        for options in [
            base,
            SamplingOptions { top_k: 40, ..base },
            SamplingOptions { top_p: 0.95, ..base },
            SamplingOptions { top_k: 40, top_p: 0.95, ..base },
        ] {
            let mut sampler = Sampler::new(options).unwrap();
            let draws: Vec<Draw> = (0..200).map(|_| sampler.draw(&[])).collect();
            for round in 0..2 {
                let started = std::time::Instant::now();
                for draw in &draws {
                    kernels.issue(&device, &mut state, &on_device, vocab, &choice, draw).unwrap();
                }
                device.synchronize().unwrap();
                let us = 1e6 * started.elapsed().as_secs_f64() / draws.len() as f64;
                if round == 1 {
                    println!("top-k {:>3}, top-p {:.2}: {us:.1} us a draw of {vocab}", options.top_k, options.top_p);
                }
            }
        }
    }
}
