//! Checkpoints in Hugging Face layout: safetensors, one file or shards with an index. A GGUF file is opened as if it were one.
//!
//! Headers are read and validated when the checkpoint is opened; a tensor's bytes are mapped when it is asked for and
//! unmapped with its last reference, so that a pass over a model holds one tensor at a time.

use crate::error::{Error, Result};
use crate::gguf::blocks::BlockType;
use crate::gguf::model::{Renamed, rope_factors, unrotate};
use crate::gguf::{Gguf, GgufTensor, is_gguf};
use bytes::Bytes;
use memmap2::MmapOptions;
use rayon::prelude::*;
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
    /// How a GGUF file stores it.
    gguf: Option<Stored>,
}

/// How a GGUF file stores a tensor.
#[derive(Debug, Clone, Copy)]
struct Stored {
    block_type: BlockType,
    n_bytes: usize,
    rotated_heads: Option<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its length in bytes in the file: less than [`n_bytes`](Self::n_bytes) where a GGUF file has it quantized.
    pub fn stored_bytes(&self) -> usize {
        self.gguf.map_or(self.n_bytes, |stored| stored.n_bytes)
    }

    /// The name of its type in the file: the dtype, or a block type of GGUF.
    pub fn stored_type(&self) -> String {
        self.gguf.map_or_else(|| self.dtype.to_string(), |stored| stored.block_type.name())
    }

    /// Whether an encoder takes it: a matrix of BF16, F16 or F32 that is not empty.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2 && self.dtype.is_float() && self.n_bytes > 0
    }
}

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Its name within its directory.
    pub file_name: String,
    /// The name of the safetensors file that an archive has in its place.
    pub archive_name: String,
    /// Its length in bytes.
    pub n_bytes: u64,
    /// The header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Its tensors among [`Checkpoint::tensors`], in the order of their bytes.
    pub tensors: Range<usize>,
    path: PathBuf,
    file: File,
}

impl Shard {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A checkpoint or an archive: a directory with safetensors, or a GGUF file, its headers read and validated.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory, or the GGUF file.
    dir: PathBuf,
    is_indexed: bool,
    shards: Vec<Shard>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a directory that holds `model.safetensors`, shards with `model.safetensors.index.json`, or one other
    /// `*.safetensors`; or a GGUF file.
    ///
    /// # Errors
    /// A directory or file that cannot be read, or holds no weights; a header that is truncated, malformed or does not
    /// fit its file; an index and shards that disagree; a name that occurs twice; a GGUF file of a model that is not
    /// supported.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if is_gguf(dir) {
            return Self::open_gguf(dir);
        }
        if !std::fs::metadata(dir).map_err(|e| Error::io(dir, e))?.is_dir() {
            return Err(Error::Parameter(format!(
                "{} is a file, and not GGUF; give the directory that holds the checkpoint",
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

    fn open_gguf(path: &Path) -> Result<Self> {
        let (file, gguf) = open_gguf(path)?;
        let mut checkpoint = Self {
            dir: path.into(),
            is_indexed: false,
            shards: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        for tensor in gguf.tensors() {
            let Some(Renamed { name, rotated_heads }) = gguf.renamed(tensor)? else { continue };
            let n_elements: usize = tensor.shape.iter().product();
            let dtype = match tensor.block_type {
                BlockType::F16 => Dtype::F16,
                BlockType::BF16 => Dtype::Bf16,
                _ => Dtype::F32,
            };
            checkpoint.by_name.insert(name.clone(), checkpoint.tensors.len());
            checkpoint.tensors.push(TensorInfo {
                name,
                dtype,
                shape: tensor.shape.clone(),
                shard: 0,
                offset: tensor.range.start,
                n_bytes: n_elements * dtype.bits() / 8,
                gguf: Some(Stored {
                    block_type: tensor.block_type,
                    n_bytes: (tensor.range.end - tensor.range.start) as usize,
                    rotated_heads,
                }),
            });
        }
        // What the weights alone would not show is refused here.
        gguf.config(gguf_rope_factors(path, &file, &gguf)?.as_deref())?;
        checkpoint.shards.push(Shard {
            file_name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            archive_name: SINGLE_FILE.into(),
            n_bytes: file.metadata().map_err(|e| Error::io(path, e))?.len(),
            metadata: BTreeMap::from([("format".into(), "pt".into())]),
            tensors: 0..checkpoint.tensors.len(),
            path: path.into(),
            file,
        });
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
                gguf: None,
            });
        }
        let tensors = first..self.tensors.len();
        self.shards.push(Shard {
            archive_name: file_name.clone(),
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

    /// The directory, or the GGUF file.
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
    /// The file must not be cut short while it is mapped; replacing it by a new one is safe. What a GGUF file has quantized, or in
    /// another order, is computed anew each time.
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
        let mut data = map(&shard.path, &shard.file, info.offset, info.stored_bytes())?;
        if let Some(Stored { block_type, rotated_heads, .. }) = info.gguf {
            if let Some(heads) = rotated_heads {
                data = unrotate(&data, info.shape[0], heads).into();
            }
            if block_type.is_quantized() {
                data = dequantize(block_type, &data, info.n_elements());
            }
        }
        Ok(Tensor { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), data })
    }
}

/// Maps `n_bytes` bytes, which lie within the file.
fn map(path: &Path, file: &File, offset: u64, n_bytes: usize) -> Result<Bytes> {
    if n_bytes == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is read-only and lies within the file, whose length the callers have checked. Another process that
    // rewrites the file in place can change the bytes, as for every mapped file; whatever they are, decoders stay in
    // bounds.
    let map = unsafe { MmapOptions::new().offset(offset).len(n_bytes).map(file) };
    Ok(Bytes::from_owner(map.map_err(|e| Error::io(path, e))?))
}

/// The values of `n` weights as float32.
fn dequantize(block_type: BlockType, data: &[u8], n: usize) -> Bytes {
    const BLOCKS: usize = 1 << 10;
    let mut values = vec![0f32; n];
    let (weights, bytes) = (BLOCKS * block_type.block_weights(), BLOCKS * block_type.block_bytes());
    values.par_chunks_mut(weights).zip(data.par_chunks(bytes)).for_each(|(out, data)| {
        block_type.dequantize(data, out);
        out.iter_mut().for_each(|v| *v = f32::from_bits(v.to_bits().to_le()));
    });
    Bytes::from_owner(Floats(values))
}

/// Floats as bytes.
struct Floats(Vec<f32>);

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn open_gguf(path: &Path) -> Result<(File, Gguf)> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let gguf = Gguf::open(path, &file)?;
    Ok((file, gguf))
}

fn gguf_rope_factors(path: &Path, file: &File, gguf: &Gguf) -> Result<Option<Vec<f32>>> {
    rope_factors(gguf, |tensor: &GgufTensor| {
        let data = map(path, file, tensor.range.start, (tensor.range.end - tensor.range.start) as usize)?;
        let mut values = vec![0.0; tensor.shape.iter().product()];
        tensor.block_type.dequantize(&data, &mut values);
        Ok(values)
    })
}

/// The files that stand beside a GGUF model's weights, made from its metadata; and why the tokenizer's are not among them,
/// where they are not.
pub fn gguf_files(path: &Path) -> Result<(BTreeMap<String, String>, Option<Error>)> {
    let (file, gguf) = open_gguf(path)?;
    gguf.files(gguf_rope_factors(path, &file, &gguf)?.as_deref())
}

/// The text of a file that stands beside a model's weights (`config.json`, say); `None` where there is no such file. `src` is a
/// directory, or a GGUF file, whose files are made from its metadata.
///
/// # Errors
/// A file that cannot be read or is not UTF-8; a GGUF file whose tokenizer is not supported, where a file of the tokenizer
/// is asked for.
pub fn read_file(src: &Path, name: &str) -> Result<Option<String>> {
    if is_gguf(src) {
        let (mut files, lacking) = gguf_files(src)?;
        return match (files.remove(name), lacking) {
            (None, Some(e)) if name.starts_with("tokenizer") => Err(e),
            (text, _) => Ok(text),
        };
    }
    let path = src.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
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
            let gguf = names.iter().find(|n| n.ends_with(".gguf"));
            let pickled = names.iter().find(|n| n.ends_with(".bin") || n.ends_with(".pt") || n.ends_with(".pth"));
            let advice = match (gguf, pickled) {
                (Some(name), _) => format!("; to use {name}, give that file itself"),
                (None, Some(name)) => {
                    format!(
                        "; {name} is in another format: save the model with `save_pretrained` of Transformers first"
                    )
                }
                (None, None) => String::new(),
            };
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
