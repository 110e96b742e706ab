//! Checkpoints in Hugging Face layout: safetensors, one file or shards with an index.
//!
//! Headers are read and validated when the checkpoint is opened; a tensor's bytes are mapped when it is asked for and
//! unmapped with its last reference, so that a pass over a model holds one tensor at a time.

use crate::error::{Error, Result};
use bytes::Bytes;
use memmap2::MmapOptions;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// The weights of a checkpoint in one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The model's configuration.
pub const CONFIG_FILE: &str = "config.json";
/// A safetensors header may be this long, as in the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of a safetensors file before its header: the header's length.
const LENGTH_BYTES: u64 = 8;

/// Element types of source tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16
    Bf16,
    /// IEEE binary16
    F16,
    /// IEEE binary32
    F32,
    /// Bytes: an encoded tensor
    U8,
    /// Anything else that safetensors knows: carried along untouched
    Other(safetensors::Dtype),
}

impl Dtype {
    /// Whether an encoder takes it.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16 | Self::F32)
    }

    /// Bits of an element.
    pub fn bits(self) -> usize {
        safetensors::Dtype::from(self).bitsize()
    }
}

impl From<safetensors::Dtype> for Dtype {
    fn from(dtype: safetensors::Dtype) -> Self {
        match dtype {
            safetensors::Dtype::BF16 => Self::Bf16,
            safetensors::Dtype::F16 => Self::F16,
            safetensors::Dtype::F32 => Self::F32,
            safetensors::Dtype::U8 => Self::U8,
            other => Self::Other(other),
        }
    }
}

impl From<Dtype> for safetensors::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
            Dtype::F32 => Self::F32,
            Dtype::U8 => Self::U8,
            Dtype::Other(other) => other,
        }
    }
}

/// The name that safetensors gives it.
impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        safetensors::Dtype::from(*self).fmt(f)
    }
}

/// One tensor of a checkpoint; `data` maps the file, nothing is copied.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first; a matrix is `[n_rows (outputs), n_cols (inputs)]`.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub data: Bytes,
}

/// What a shard's header says of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Its name, unique within the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::shards`] holds it.
    pub shard: usize,
    /// Its first byte, from the start of the file.
    pub offset: u64,
    /// Its length in bytes.
    pub n_bytes: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether an encoder takes it: a matrix of BF16, F16 or F32 that is not empty.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2 && self.dtype.is_float() && self.n_bytes > 0
    }
}

/// One safetensors file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Its name within the directory.
    pub file_name: String,
    /// Its length in bytes.
    pub n_bytes: u64,
    /// The header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Its tensors among [`Checkpoint::tensors`], in the order of their bytes.
    pub tensors: Range<usize>,
    path: PathBuf,
    file: File,
}

/// A checkpoint or an archive: a directory with safetensors, its headers read and validated.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    is_indexed: bool,
    shards: Vec<Shard>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a directory that holds `model.safetensors`, shards with `model.safetensors.index.json`, or one other
    /// `*.safetensors`.
    ///
    /// # Errors
    /// A directory or file that cannot be read, or holds no weights; a header that is truncated, malformed or does not
    /// fit its file; an index and shards that disagree; a name that occurs twice.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !std::fs::metadata(dir).map_err(|e| Error::io(dir, e))?.is_dir() {
            return Err(Error::Parameter(format!(
                "{} is a file; give the directory that holds the checkpoint",
                dir.display()
            )));
        }
        let index = match dir.join(SINGLE_FILE).exists() {
            true => None,
            false => read_index(dir)?,
        };
        let file_names = match &index {
            Some(index) => index.values().cloned().collect::<BTreeSet<_>>(),
            None => BTreeSet::from([single_file(dir)?]),
        };
        let mut checkpoint = Self {
            dir: dir.into(),
            is_indexed: index.is_some(),
            shards: Vec::with_capacity(file_names.len()),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        for file_name in file_names {
            checkpoint.add_shard(file_name)?;
        }
        if let Some(index) = index {
            checkpoint.compare_index(&index)?;
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, file_name: String) -> Result<()> {
        let path = self.dir.join(&file_name);
        let file = File::open(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::io(
                &path,
                io::Error::new(
                    e.kind(),
                    format!("{INDEX_FILE} names it, but it is not there; get the rest of the files"),
                ),
            ),
            _ => Error::io(&path, e),
        })?;
        let header = Header::read(&path, &file)?;
        let (first, shard) = (self.tensors.len(), self.shards.len());
        for (name, info) in header.tensors {
            if let Some(&other) = self.by_name.get(&name) {
                let other = &self.shards[self.tensors[other].shard].file_name;
                return Err(Error::format(
                    path.display().to_string(),
                    format!("tensor `{name}` is in {other} too; a checkpoint holds each tensor once"),
                ));
            }
            self.by_name.insert(name.clone(), self.tensors.len());
            self.tensors.push(TensorInfo {
                name,
                dtype: info.dtype.into(),
                shape: info.shape,
                shard,
                offset: header.data_start + info.data_offsets.0 as u64,
                n_bytes: info.data_offsets.1 - info.data_offsets.0,
            });
        }
        let tensors = first..self.tensors.len();
        self.shards.push(Shard {
            file_name,
            n_bytes: header.file_bytes,
            metadata: header.metadata,
            tensors,
            path,
            file,
        });
        Ok(())
    }

    fn compare_index(&self, index: &BTreeMap<String, String>) -> Result<()> {
        let bad = |problem: String| Err(Error::format(self.dir.join(INDEX_FILE).display().to_string(), problem));
        for (name, file_name) in index {
            match self.info(name).map(|info| &self.shards[info.shard].file_name) {
                Some(found) if found == file_name => {}
                Some(found) => {
                    return bad(format!("it says that tensor `{name}` is in {file_name}, but it is in {found}"));
                }
                None => return bad(format!("it says that tensor `{name}` is in {file_name}, but it is not there")),
            }
        }
        match self.tensors.iter().find(|t| !index.contains_key(&t.name)) {
            Some(t) => bad(format!("it lacks tensor `{}`, which {} holds", t.name, self.shards[t.shard].file_name)),
            None => Ok(()),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Whether `model.safetensors.index.json` lists the shards.
    pub fn is_indexed(&self) -> bool {
        self.is_indexed
    }

    /// The files, in the order of their names.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors, file by file, in the order of their bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The names, in the order of [`Self::tensors`].
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// What the header says of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Maps a tensor. Its pages are read as they are touched, and leave memory with the last clone of its data.
    /// The file must not be cut short while it is mapped; replacing it by a new one is safe.
    ///
    /// # Errors
    /// A name that the checkpoint does not have; a file that cannot be mapped, or has become shorter.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self
            .info(name)
            .ok_or_else(|| Error::Parameter(format!("{} has no tensor `{name}`", self.dir.display())))?;
        let shard = &self.shards[info.shard];
        let io_error = |e| Error::io(&shard.path, e);
        if shard.file.metadata().map_err(io_error)?.len() != shard.n_bytes {
            return Err(io_error(io::Error::other("its length changed while it was being read")));
        }
        let data = if info.n_bytes == 0 {
            Bytes::new()
        } else {
            // SAFETY: the map is read-only and lies within the file, whose length was just checked. Another process that
            // rewrites the file in place can change the bytes, as for every mapped file; whatever they are, decoders
            // stay in bounds.
            let map = unsafe { MmapOptions::new().offset(info.offset).len(info.n_bytes).map(&shard.file) };
            Bytes::from_owner(map.map_err(io_error)?)
        };
        Ok(Tensor { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), data })
    }
}

/// The one file of a checkpoint without an index.
fn single_file(dir: &Path) -> Result<String> {
    if dir.join(SINGLE_FILE).exists() {
        return Ok(SINGLE_FILE.into());
    }
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        names.extend(entry.map_err(|e| Error::io(dir, e))?.file_name().into_string().ok());
    }
    let mut weights: Vec<_> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
    match weights.len() {
        0 => {
            let pickled = names.iter().find(|n| n.ends_with(".bin") || n.ends_with(".pt") || n.ends_with(".pth"));
            let advice = pickled.map_or(String::new(), |name| {
                format!("; {name} is in another format: save the model with `save_pretrained` of Transformers first")
            });
            let problem =
                format!("no weights here: looked for {SINGLE_FILE}, {INDEX_FILE} and a single *.safetensors{advice}");
            Err(Error::io(dir, io::Error::new(io::ErrorKind::NotFound, problem)))
        }
        1 => Ok(weights.remove(0).clone()),
        _ => Err(Error::format(
            dir.display().to_string(),
            format!(
                "{} and {} lie side by side, and no {INDEX_FILE} says how they belong together; \
                 keep one of them, or add the index",
                weights[0], weights[1]
            ),
        )),
    }
}

/// The index's map from tensors to files; none where there is no index.
fn read_index(dir: &Path) -> Result<Option<BTreeMap<String, String>>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let path = dir.join(INDEX_FILE);
    let text = match std::fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| Error::io(&path, e))?,
    };
    let bad = |problem: String| Error::format(path.display().to_string(), problem);
    let index: Index = serde_json::from_slice(&text).map_err(|e| bad(format!("not a safetensors index: {e}")))?;
    let weight_map: BTreeMap<_, _> = index.weight_map.0.into_iter().collect();
    if let Some(name) = weight_map.values().find(|name| !is_plain_file_name(name) || !name.ends_with(".safetensors")) {
        return Err(bad(format!("it names the file `{name}`; shards are *.safetensors files in the same directory")));
    }
    if weight_map.is_empty() {
        return Err(bad("it lists no tensor".into()));
    }
    Ok(Some(weight_map))
}

/// Whether `name` is a file of the directory itself, on any system.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(only)) if only == name)
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
}

/// A safetensors header.
struct Header {
    /// Where the tensors' bytes begin in the file.
    data_start: u64,
    file_bytes: u64,
    metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    tensors: Vec<(String, safetensors::tensor::TensorInfo)>,
}

impl Header {
    fn read(path: &Path, mut file: &File) -> Result<Self> {
        let bad = |problem: String| Error::format(path.display().to_string(), problem);
        let file_bytes = file.metadata().map_err(|e| Error::io(path, e))?.len();
        if file_bytes < LENGTH_BYTES {
            return Err(bad(format!(
                "it has {file_bytes} bytes, and a safetensors file at least {LENGTH_BYTES}: it is truncated"
            )));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut length).map_err(|e| Error::io(path, e))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes - LENGTH_BYTES) {
            return Err(bad(format!(
                "its first bytes promise a header of {header_bytes} bytes, but the file has {file_bytes} bytes and a \
                 header at most {MAX_HEADER_BYTES}: it is truncated, or not safetensors"
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(|e| Error::io(path, e))?;

        let malformed = |e: serde_json::Error| bad(format!("its safetensors header is malformed: {e}"));
        let metadata: safetensors::tensor::Metadata = serde_json::from_slice(&header).map_err(malformed)?;
        // The library keeps the last of several entries with the same name.
        serde_json::from_slice::<UniqueMap<IgnoredAny>>(&header).map_err(malformed)?;
        let data_start = LENGTH_BYTES + header_bytes;
        let expected = data_start.checked_add(metadata.data_len() as u64);
        if expected != Some(file_bytes) {
            return Err(bad(format!(
                "its header describes a file of {} bytes, but it has {file_bytes}: it is {}",
                expected.map_or("2^64".into(), |n| n.to_string()),
                if expected.is_none_or(|n| n > file_bytes) { "truncated" } else { "damaged" }
            )));
        }
        let names = metadata.offset_keys();
        let tensors =
            names.into_iter().filter_map(|name| metadata.info(&name).cloned().map(|info| (name, info))).collect();
        let metadata = metadata.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { data_start, file_bytes, metadata, tensors })
    }
}

/// A JSON object whose keys must differ.
struct UniqueMap<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Keys<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), HashSet::new());
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format_args!("`{key}` occurs twice")));
                    }
                    entries.push((key, value));
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(Keys(PhantomData))
    }
}
