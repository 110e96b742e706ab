//! What the commands that run a model share: how it is loaded, and what it took.

use crate::hub;
use crate::output::{self, Error};
use codecllm_codec::Cpu;
use codecllm_engine::{LoadOptions, Model};
use std::path::PathBuf;

/// Flags of the machine that a model runs on.
#[derive(clap::Args)]
pub struct MachineArgs {
    /// Threads [default: every core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Instruction set of decoders and products: scalar, avx2 or avx512 [default: the fastest that the machine has]
    #[arg(long, value_name = "LEVEL")]
    cpu: Option<Cpu>,
}

impl MachineArgs {
    /// Sets the threads of all parallel work, and says how models are to be loaded. Call once.
    pub fn apply(&self) -> Result<LoadOptions, Error> {
        output::set_threads(self.threads)?;
        let defaults = LoadOptions::default();
        Ok(LoadOptions { cpu: self.cpu.unwrap_or(defaults.cpu), threads: self.threads.unwrap_or(0), ..defaults })
    }
}

/// The directory of a model that the user names, and the model, loaded from it.
pub fn open(name: &str, options: &LoadOptions) -> Result<(PathBuf, Model), Error> {
    let dir = hub::resolve(name, hub::DEFAULT_REVISION)?;
    let model = Model::load(&dir, options)?;
    Ok((dir, model))
}

/// The most memory that this process had resident so far, in bytes: mapped weights that were read are part of it.
/// `None` where the system does not tell (it does on Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
