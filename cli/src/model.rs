//! What the commands that run a model share: how it is loaded, and what it took.

use crate::output::{self, Bar, Error, Unit};
use codecllm_codec::Cpu;
use codecllm_codec::checkpoint::Checkpoint;
use codecllm_codec::encoded::Checks;
use codecllm_engine::backend::Backend;
use codecllm_engine::cpu::CpuBackend;
use codecllm_engine::cuda::{CudaBackend, Device};
use codecllm_engine::evaluate::DEFAULT_WINDOW;
use codecllm_engine::weights::Loader;
use codecllm_engine::{CachePolicy, Config, LoadOptions, Logits, MemoryUse, Model, TensorSource};
use std::path::Path;
use std::str::FromStr;

/// The text that models are measured on where the user gives none.
pub const TALE: &str = include_str!("../../assets/tale.txt");

/// The text in a file.
pub fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// Flags of the machine that a model runs on.
#[derive(clap::Args)]
pub struct MachineArgs {
    /// What runs the model: cpu, or cuda for an NVIDIA GPU (cuda:1 for the second one)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceName,
    /// Threads [default: every core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Instruction set of decoders and products: scalar, avx2 or avx512 [default: the fastest that the machine has]
    #[arg(long, value_name = "LEVEL")]
    cpu: Option<Cpu>,
    /// GPU memory that a model may take: weights, KV cache, activations and working memory, but for the driver's own
    /// [default: what is free]
    #[arg(long, value_name = "GB")]
    vram: Option<f64>,
    /// Which weights the GPU keeps decoded, first layers first, as many as fit: none; lossless: those of format bf16, which
    /// are the same; any: also fp8, int8 and rate, rounded to BF16 [default: lossless with --vram, none without]
    #[arg(long, value_name = "POLICY")]
    cache: Option<CachePolicy>,
}

/// A device, as the user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        index.map(Self::Cuda).ok_or_else(|| format!("expected cpu, cuda or cuda:N, as in cuda:1; found `{text}`"))
    }
}

/// What models are loaded onto.
pub enum Machine {
    Cpu(OnCpu),
    Cuda(OnCuda),
}

impl MachineArgs {
    /// Sets the threads of all parallel work, and says how models are to be loaded. Call once.
    pub fn apply(&self) -> Result<Machine, Error> {
        output::set_threads(self.threads)?;
        let defaults = LoadOptions::default();
        let cpu = self.cpu.unwrap_or(defaults.cpu);
        let vram_bytes = self.limits()?;
        Ok(match self.device {
            DeviceName::Cpu => Machine::Cpu(OnCpu(LoadOptions { cpu, threads: self.threads.unwrap_or(0), ..defaults })),
            DeviceName::Cuda(index) => Machine::Cuda(OnCuda { index, vram_bytes, policy: self.cache }),
        })
    }

    /// The GPU memory that a model may take, in bytes, where the user says so.
    fn limits(&self) -> Result<Option<u64>, Error> {
        let wrong = |problem: String| Error::from(codecllm_codec::Error::Parameter(problem));
        if self.device == DeviceName::Cpu && (self.vram.is_some() || self.cache.is_some()) {
            return Err(wrong("--vram and --cache are for a GPU's memory; they go with --device cuda".into()));
        }
        if let Some(vram) = self.vram.filter(|vram| !(*vram > 0.0 && vram.is_finite())) {
            return Err(wrong(format!("--vram is {vram}; it must be a number of GB above 0, as in --vram 8")));
        }
        Ok(self.vram.map(|gb| (gb * 1e9) as u64))
    }
}

/// What a model is loaded for: memory has to be left for it.
#[derive(Debug, Clone, Copy)]
pub struct Purpose {
    /// Tokens of a sequence, prompt and generated ones together.
    pub n_positions: usize,
    /// The tokens whose logits are asked for.
    pub logits: Logits,
}

impl Purpose {
    /// Measuring a text in windows of so many tokens.
    pub fn evaluation(window: usize) -> Self {
        Self { n_positions: window, logits: Logits::All }
    }
}

/// A way to load models: what the commands that run them are generic over.
pub trait Load {
    /// What they run on.
    type Backend: Backend;

    /// Loads a checkpoint or an archive.
    fn load_for(&self, dir: &Path, purpose: Purpose) -> Result<Model<Self::Backend>, Error>;

    /// Loads a model from any source of tensors, to measure texts in windows of the usual size.
    fn load_source(&self, config: Config, source: &dyn TensorSource) -> Result<Model<Self::Backend>, Error>;

    /// Loads a checkpoint or an archive, to measure texts in windows of the usual size.
    fn load(&self, dir: &Path) -> Result<Model<Self::Backend>, Error> {
        self.load_for(dir, Purpose::evaluation(DEFAULT_WINDOW))
    }
}

fn loading() -> Bar {
    Bar::new("loading", Unit::Bytes)
}

/// Loads models onto the processor's cores.
pub struct OnCpu(LoadOptions);

impl OnCpu {
    fn backend(&self) -> Result<CpuBackend, Error> {
        Ok(CpuBackend::new(self.0.cpu, self.0.threads)?)
    }
}

impl Load for OnCpu {
    type Backend = CpuBackend;

    fn load_for(&self, dir: &Path, _: Purpose) -> Result<Model, Error> {
        Ok(Model::load_on(self.backend()?, dir, self.0.check, &loading())?)
    }

    fn load_source(&self, config: Config, source: &dyn TensorSource) -> Result<Model, Error> {
        Ok(Model::on_backend(self.backend()?, config, &Loader::new(source, self.0.check).with_progress(&loading()))?)
    }
}

/// Loads models onto a GPU.
pub struct OnCuda {
    index: usize,
    vram_bytes: Option<u64>,
    policy: Option<CachePolicy>,
}

/// Memory that is left free where the user does not say how much may be taken: for kernels, and what the driver rounds up.
const SPARE_BYTES: u64 = 256 << 20;

impl OnCuda {
    /// Opens the GPU, for weights of so many bytes, and says what the model may take.
    fn device(&self, weight_bytes: u64) -> Result<(Device, u64), Error> {
        let device = Device::open(self.index)?;
        device.check_room(weight_bytes)?;
        let free = device.memory()?.0 as u64;
        let budget = match self.vram_bytes {
            None => free.saturating_sub(SPARE_BYTES),
            Some(vram) if vram > free => {
                let (vram, free) = (output::bytes(vram), output::bytes(free));
                return Err(
                    format!("--vram asks for {vram}, but GPU {} has {free} free; ask for less", self.index).into()
                );
            }
            Some(vram) if vram < weight_bytes => {
                let (vram, needed) = (output::bytes(vram), output::bytes(weight_bytes));
                return Err(format!(
                    "the weights alone take {needed}, and --vram gives {vram}; raise it, compress the model further, or use \
                     --device cpu"
                )
                .into());
            }
            Some(vram) => vram,
        };
        Ok((device, budget))
    }

    fn keep_decoded(&self, model: &mut Model<CudaBackend>, budget: u64, purpose: Purpose) -> Result<(), Error> {
        if self.vram_bytes.is_some() || self.policy.is_some() {
            model.keep_decoded(self.policy.unwrap_or_default(), budget, purpose.n_positions, purpose.logits)?;
        }
        Ok(())
    }
}

impl Load for OnCuda {
    type Backend = CudaBackend;

    fn load_for(&self, dir: &Path, purpose: Purpose) -> Result<Model<CudaBackend>, Error> {
        let (device, budget) = self.device(TensorSource::n_bytes(&Checkpoint::open(dir)?))?;
        let mut model = Model::load_on(CudaBackend::new(device)?, dir, Checks::Full, &loading())?;
        self.keep_decoded(&mut model, budget, purpose)?;
        Ok(model)
    }

    fn load_source(&self, config: Config, source: &dyn TensorSource) -> Result<Model<CudaBackend>, Error> {
        let (device, budget) = self.device(source.n_bytes())?;
        let loader = Loader::new(source, Checks::Full);
        let mut model = Model::on_backend(CudaBackend::new(device)?, config, &loader.with_progress(&loading()))?;
        self.keep_decoded(&mut model, budget, Purpose::evaluation(DEFAULT_WINDOW))?;
        Ok(model)
    }
}

/// What a model takes of the GPU's memory, for people.
pub fn describe_memory(memory: &MemoryUse) -> String {
    format!(
        "{} of {} layers kept decoded ({}); {} of {} of GPU memory planned for: other weights {}, {} tokens {}, working \
         memory {}",
        memory.n_decoded_layers,
        memory.n_layers,
        output::bytes(memory.decoded_bytes),
        output::bytes(memory.total_bytes()),
        output::bytes(memory.budget_bytes),
        output::bytes(memory.other_weight_bytes),
        memory.n_positions,
        output::bytes(memory.sequence_bytes),
        output::bytes(memory.working_bytes),
    )
}

/// The most memory that this process had resident so far, in bytes: mapped weights that were read are part of it.
/// `None` where the system does not tell (it does on Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(device: DeviceName, vram: Option<f64>, cache: Option<CachePolicy>) -> MachineArgs {
        MachineArgs { device, threads: None, cpu: None, vram, cache }
    }

    #[test]
    fn memory_is_for_gpus_and_a_number() {
        let error = |machine: MachineArgs| machine.limits().err().unwrap().to_string();
        for (vram, cache) in [(Some(8.0), None), (None, Some(CachePolicy::Any))] {
            assert!(error(machine(DeviceName::Cpu, vram, cache)).contains("--device cuda"));
            assert!(machine(DeviceName::Cuda(0), vram, cache).limits().is_ok());
        }
        for vram in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(error(machine(DeviceName::Cuda(0), Some(vram), None)).contains("above 0"));
        }
        assert_eq!(machine(DeviceName::Cuda(0), Some(1.5), None).limits().unwrap(), Some(1_500_000_000));
    }

    #[test]
    fn devices_are_parsed_or_explained() {
        for (text, expected) in
            [("cpu", DeviceName::Cpu), ("cuda", DeviceName::Cuda(0)), ("cuda:3", DeviceName::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(expected));
        }
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(bad.parse::<DeviceName>().unwrap_err().contains("cuda:N"), "{bad}");
        }
    }
}
