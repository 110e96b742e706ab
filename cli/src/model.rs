//! What the commands that run a model share: how it is loaded, and what it took.

use crate::hub;
use crate::output::{self, Error};
use codecllm_codec::Cpu;
use codecllm_codec::checkpoint::Checkpoint;
use codecllm_codec::encoded::Checks;
use codecllm_engine::backend::Backend;
use codecllm_engine::cpu::CpuBackend;
use codecllm_engine::cuda::{CudaBackend, Device};
use codecllm_engine::weights::Loader;
use codecllm_engine::{Config, LoadOptions, Model, TensorSource};
use std::path::{Path, PathBuf};
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
        Ok(match self.device {
            DeviceName::Cpu => Machine::Cpu(OnCpu(LoadOptions { cpu, threads: self.threads.unwrap_or(0), ..defaults })),
            DeviceName::Cuda(index) => Machine::Cuda(OnCuda(index)),
        })
    }
}

/// A way to load models: what the commands that run them are generic over.
pub trait Load {
    /// What they run on.
    type Backend: Backend;

    /// Loads a checkpoint or an archive.
    fn load(&self, dir: &Path) -> Result<Model<Self::Backend>, Error>;

    /// Loads a model from any source of tensors.
    fn load_source(&self, config: Config, source: &dyn TensorSource) -> Result<Model<Self::Backend>, Error>;

    /// The directory of a model that the user names, and the model, loaded from it.
    fn open(&self, name: &str) -> Result<(PathBuf, Model<Self::Backend>), Error> {
        let dir = hub::resolve(name, hub::DEFAULT_REVISION)?;
        let model = self.load(&dir)?;
        Ok((dir, model))
    }
}

/// Loads models onto the processor's cores.
pub struct OnCpu(LoadOptions);

impl Load for OnCpu {
    type Backend = CpuBackend;

    fn load(&self, dir: &Path) -> Result<Model, Error> {
        Ok(Model::load(dir, &self.0)?)
    }

    fn load_source(&self, config: Config, source: &dyn TensorSource) -> Result<Model, Error> {
        Ok(Model::from_source(config, source, &self.0)?)
    }
}

/// Loads models onto the GPU of this number.
pub struct OnCuda(usize);

impl Load for OnCuda {
    type Backend = CudaBackend;

    fn load(&self, dir: &Path) -> Result<Model<CudaBackend>, Error> {
        let device = Device::open(self.0)?;
        let n_bytes =
            Checkpoint::open(dir)?.tensors().iter().map(|t| (t.n_elements() * t.dtype.bits() / 8) as u64).sum();
        device.check_room(n_bytes)?;
        Ok(Model::load_on(CudaBackend::new(device)?, dir, Checks::Full)?)
    }

    fn load_source(&self, config: Config, source: &dyn TensorSource) -> Result<Model<CudaBackend>, Error> {
        let backend = CudaBackend::new(Device::open(self.0)?)?;
        Ok(Model::on_backend(backend, config, &Loader::new(source, Checks::Full))?)
    }
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
