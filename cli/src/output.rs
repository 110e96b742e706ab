//! What every command shares: printing, progress, errors and exit codes, Ctrl-C.

use codecllm_codec::archive::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::error::Error as StdError;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Any error of a command.
pub type Error = Box<dyn StdError + Send + Sync>;

/// What a command returns: its exit code, or the error that ended it.
pub type CliResult = Result<ExitCode, Error>;

/// Exit code of a failure.
const FAILED: u8 = 1;
/// Exit code of a wrong use, and of a check that could not be made.
pub const UNUSABLE: u8 = 2;
/// Exit code after Ctrl-C: 128 and SIGINT's number.
pub const INTERRUPTED: u8 = 130;

/// Prints to standard output, with a newline. A reader that has gone away ends the output, not the command.
pub fn print(text: impl std::fmt::Display) -> Result<(), Error> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(format!("standard output: {e}").into()),
        _ => Ok(()),
    }
}

/// Prints a command's one JSON object.
pub fn print_json(value: &impl Serialize) -> Result<(), Error> {
    print(serde_json::to_string_pretty(value)?)
}

/// Prints an error with its causes, and chooses the exit code.
pub fn fail(error: &(dyn StdError + Send + Sync + 'static)) -> ExitCode {
    let mut told = error.to_string();
    eprintln!("error: {told}");
    let mut cause = error.source();
    while let Some(e) = cause {
        // Many errors spell out their cause already.
        if !told.contains(&e.to_string()) {
            told = e.to_string();
            eprintln!("  caused by: {told}");
        }
        cause = e.source();
    }
    ExitCode::from(exit_code(error))
}

fn exit_code(error: &(dyn StdError + 'static)) -> u8 {
    use codecllm_codec::Error as Codec;
    use codecllm_engine::Error as Engine;
    let codec = match error.downcast_ref() {
        Some(Engine::Codec(codec)) => Some(codec),
        Some(Engine::Parameter(_)) => return UNUSABLE,
        _ => error.downcast_ref(),
    };
    match codec {
        Some(Codec::Interrupted) => INTERRUPTED,
        Some(Codec::Parameter(_)) => UNUSABLE,
        _ => FAILED,
    }
}

static STOPPED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C (or a request to terminate) sets [`is_stopped`]; a second one ends the process at once.
pub fn catch_ctrl_c() -> Result<(), Error> {
    ctrlc::set_handler(|| {
        if STOPPED.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        eprintln!("\nstopping; press Ctrl-C again to stop at once");
    })?;
    Ok(())
}

/// Whether the user asked for an end.
pub fn is_stopped() -> bool {
    STOPPED.load(Ordering::Relaxed)
}

/// Sets the number of threads; every core without a number. Call before any parallel work.
pub fn set_threads(n: Option<usize>) -> Result<(), Error> {
    rayon::ThreadPoolBuilder::new().num_threads(n.unwrap_or(0)).build_global()?;
    Ok(())
}

/// A number of bytes for people, in decimal units.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A progress bar on standard error, with rate and time left; silent where that is not a terminal.
pub struct Bar {
    bar: ProgressBar,
}

/// What a bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Tokens,
}

impl Bar {
    /// A bar that says what is being done.
    pub fn new(doing: &'static str, unit: Unit) -> Self {
        let style = ProgressStyle::with_template(match unit {
            Unit::Bytes => {
                "{prefix} {bar:24} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left  {wide_msg}"
            }
            Unit::Tokens => "{prefix} {bar:24} {pos}/{len} tokens  {per_sec}  {eta} left",
        });
        let bar = ProgressBar::new(0).with_prefix(doing);
        Self { bar: bar.with_style(style.expect("the template is well-formed")) }
    }
}

/// A progress bar that counts steps of some unit; silent where standard error is not a terminal.
pub fn steps_bar(doing: &'static str, unit: &'static str, len: usize) -> ProgressBar {
    let template = format!("{{prefix}} {{bar:24}} {{pos}}/{{len}} {unit}  {{eta}} left");
    let style = ProgressStyle::with_template(&template).expect("the template is well-formed");
    ProgressBar::new(len as u64).with_prefix(doing).with_style(style)
}

/// Tells a bar of steps how many are done, and the work whether the user asked for its end.
pub fn advance(bar: &ProgressBar) -> impl FnMut(usize) -> ControlFlow<()> {
    |n_done| {
        bar.set_position(n_done as u64);
        if is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Progress for Bar {
    fn begin(&self, total_bytes: u64) {
        self.bar.set_length(total_bytes);
        self.bar.reset();
    }

    fn tensor(&self, name: &str) {
        self.bar.set_message(name.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("note: {text}"));
    }

    fn is_stopped(&self) -> bool {
        is_stopped()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        for (n, text) in [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (2_200_000_000, "2.2 GB")]
        {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn exit_codes_say_whose_fault_it_is() {
        use codecllm_codec::Error;
        for (error, code) in
            [(Error::Interrupted, 130), (Error::Parameter("no".into()), 2), (Error::format("file", "bad"), 1)]
        {
            assert_eq!(exit_code(&error), code);
            assert_eq!(exit_code(&codecllm_engine::Error::from(error)), code);
        }
        assert_eq!(exit_code(&codecllm_engine::Error::Parameter("no".into())), 2);
    }
}
