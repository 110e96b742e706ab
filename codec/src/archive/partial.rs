//! Where an archive grows: a directory beside the target, which takes the target's place at the very end.

use super::Progress;
use super::provenance::{FileRecord, PROVENANCE_FILE, Settings, to_pretty_json};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Lists the finished shards of a partial archive; a directory with this file is ours to empty.
const JOURNAL_FILE: &str = ".codecllm-journal.json";

/// Where [`super::compress`] builds the archive `dst`: `DST.partial`, beside it.
pub fn partial_path(dst: &Path) -> PathBuf {
    sibling(dst, ".partial")
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    path.with_file_name(name)
}

/// The place of an archive to be made, found to be free or replaceable.
pub(super) struct Target {
    dst: PathBuf,
    partial: PathBuf,
    /// Where an older archive waits while the new one takes its place.
    replaced: PathBuf,
}

impl Target {
    /// Checks that an archive may be made at `dst` from `src`.
    pub(super) fn new(src: &Path, dst: &Path, force: bool, progress: &dyn Progress) -> Result<Self> {
        let refuse = |problem: &str| Err(Error::Parameter(format!("{}: {problem}", dst.display())));
        if dst.file_name().is_none() {
            return refuse("give the output directory a name of its own");
        }
        let dst = std::path::absolute(dst).map_err(|e| Error::io(dst, e))?;
        let target = Self { partial: partial_path(&dst), replaced: sibling(&dst, ".replaced"), dst };
        let source = fs::canonicalize(src).map_err(|e| Error::io(src, e))?;
        for place in [&target.dst, &target.partial, &target.replaced] {
            if fs::canonicalize(place).is_ok_and(|place| source.starts_with(place)) {
                return refuse("it is or holds the source; choose another output directory");
            }
        }
        // A run that died between the two renames of `install` left the older archive aside.
        if !target.dst.exists() && target.replaced.join(PROVENANCE_FILE).exists() {
            fs::rename(&target.replaced, &target.dst).map_err(|e| Error::io(&target.replaced, e))?;
            progress.note(&format!("brought back {}, which an earlier run had put aside", target.dst.display()));
        }
        let Ok(found) = fs::symlink_metadata(&target.dst) else {
            return Ok(target);
        };
        if !force {
            return refuse("it exists already; choose another output directory, or replace it with --force");
        }
        if found.is_symlink() {
            return refuse("it is a symbolic link; give the directory that it points to");
        }
        if !is_replaceable(&target.dst) {
            return refuse("it is not an archive of codecllm, and --force replaces nothing else; remove it yourself");
        }
        if target.replaced.exists() && !is_replaceable(&target.replaced) {
            return refuse(&format!("{} is in the way; move it away", target.replaced.display()));
        }
        Ok(target)
    }

    /// Puts the finished directory in the target's place; an older archive leaves only after that worked.
    fn install(&self) -> Result<()> {
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| Error::io(to, e));
        let is_replacing = self.dst.exists();
        if is_replacing {
            if self.replaced.exists() {
                remove_dir(&self.replaced)?;
            }
            rename(&self.dst, &self.replaced)?;
        }
        if let Err(e) = rename(&self.partial, &self.dst) {
            if is_replacing {
                rename(&self.replaced, &self.dst)?;
            }
            return Err(e);
        }
        if let Some(parent) = self.dst.parent() {
            sync_dir(parent)?;
        }
        if is_replacing { remove_dir(&self.replaced) } else { Ok(()) }
    }
}

/// A shard that is complete on the disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FinishedShard {
    /// The file that it was made from.
    pub source: FileRecord,
    /// The file that was made.
    pub output: FileRecord,
    /// Bytes of its tensors.
    pub tensor_bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct Journal {
    version: String,
    options: Settings,
    shards: Vec<FinishedShard>,
}

/// The directory in which an archive grows, locked against other runs.
pub(super) struct Partial {
    target: Target,
    journal: Journal,
    /// Holds the lock.
    _lock: Option<File>,
}

impl Partial {
    /// Creates the directory, or with `resume` continues in the one that an interrupted run left.
    pub(super) fn open(target: Target, options: Settings, resume: bool, progress: &dyn Progress) -> Result<Self> {
        let dir = &target.partial;
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let lock = lock_dir(dir)?;
        let journal_path = dir.join(JOURNAL_FILE);
        let is_empty = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?.next().is_none();
        if !is_empty && !journal_path.exists() && !temporary(&journal_path).exists() {
            return Err(Error::Parameter(format!(
                "{}: the archive is built here, but there are files that no earlier run left; move them away",
                dir.display()
            )));
        }
        let fresh = Journal { version: env!("CARGO_PKG_VERSION").into(), options, shards: Vec::new() };
        let found: Option<Journal> = fs::read(&journal_path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let journal = match found {
            Some(found) if resume && (&found.version, &found.options) == (&fresh.version, &fresh.options) => found,
            _ if resume && is_empty => {
                progress.note("there is nothing to resume; starting from the beginning");
                fresh
            }
            _ if resume => {
                progress.note("the interrupted run had other options or another version; starting from the beginning");
                fresh
            }
            Some(found) if !found.shards.is_empty() => {
                progress.note(&format!(
                    "discarding the {} finished shards of an interrupted run; --resume would have kept them",
                    found.shards.len()
                ));
                fresh
            }
            _ => fresh,
        };
        let partial = Self { target, journal, _lock: lock };
        partial.write_journal()?;
        partial.remove_leftovers()?;
        Ok(partial)
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.target.partial
    }

    /// What the journal says of a shard.
    pub(super) fn finished(&self, file_name: &str) -> Option<&FinishedShard> {
        self.journal.shards.iter().find(|s| s.output.file == file_name)
    }

    /// Where to write a shard until it is finished.
    pub(super) fn unfinished_path(&self, file_name: &str) -> PathBuf {
        self.dir().join(format!("{file_name}.unfinished"))
    }

    /// Gives a shard, written and synced, its name, and remembers it for `--resume`.
    pub(super) fn finish(&mut self, source: FileRecord, file_name: &str, tensor_bytes: u64) -> Result<FinishedShard> {
        let path = self.dir().join(file_name);
        fs::rename(self.unfinished_path(file_name), &path).map_err(|e| Error::io(&path, e))?;
        let output = FileRecord::of(self.dir(), file_name)?;
        let shard = FinishedShard { source, output, tensor_bytes };
        self.journal.shards.retain(|s| s.output.file != shard.output.file);
        self.journal.shards.push(shard.clone());
        self.write_journal()?;
        Ok(shard)
    }

    fn write_journal(&self) -> Result<()> {
        let path = self.dir().join(JOURNAL_FILE);
        write_synced(&temporary(&path), to_pretty_json(&self.journal).as_bytes())?;
        fs::rename(temporary(&path), &path).map_err(|e| Error::io(&path, e))?;
        sync_dir(self.dir())
    }

    /// Removes whatever the journal does not list.
    fn remove_leftovers(&self) -> Result<()> {
        let io_error = |e| Error::io(self.dir(), e);
        for entry in fs::read_dir(self.dir()).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let name = entry.file_name();
            let keep = name == JOURNAL_FILE || name.to_str().is_some_and(|name| self.finished(name).is_some());
            if !keep {
                fs::remove_file(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
            }
        }
        Ok(())
    }

    /// Everything is written: makes the directory the archive.
    pub(super) fn install(self) -> Result<()> {
        sync_dir(self.dir())?;
        self.target.install()?;
        let journal = self.target.dst.join(JOURNAL_FILE);
        fs::remove_file(&journal).map_err(|e| Error::io(&journal, e))
    }

    /// After a failure: keeps what `--resume` can use if `keep`, and removes the rest. What cannot be removed stays; the
    /// failure itself is what the user needs to hear.
    pub(super) fn abandon(self, keep: bool) {
        if keep && !self.journal.shards.is_empty() {
            let _ = self.remove_leftovers();
        } else {
            let _ = fs::remove_dir_all(self.dir());
        }
    }
}

/// Whether `dir` is an archive, or an empty directory.
fn is_replaceable(dir: &Path) -> bool {
    dir.join(PROVENANCE_FILE).is_file() || fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

fn temporary(path: &Path) -> PathBuf {
    sibling(path, ".new")
}

fn remove_dir(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).map_err(|e| Error::io(path, e))
}

/// Writes a small file and brings it to the disk.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(path, e))
}

/// Locks a directory against other runs until the file is dropped; the lock follows the directory through a rename.
#[cfg(unix)]
fn lock_dir(dir: &Path) -> Result<Option<File>> {
    let file = File::open(dir).map_err(|e| Error::io(dir, e))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => {
            Err(Error::Parameter(format!("{}: another run is writing here; wait for it to end", dir.display())))
        }
        // A file system without locks: nothing to hold.
        Err(fs::TryLockError::Error(_)) => Ok(None),
    }
}

#[cfg(not(unix))]
fn lock_dir(_dir: &Path) -> Result<Option<File>> {
    Ok(None)
}

/// Brings a directory's entries to the disk.
#[cfg(unix)]
fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, e))
}

#[cfg(not(unix))]
fn sync_dir(_dir: &Path) -> Result<()> {
    Ok(())
}
