//! GGUF files, the format of llama.cpp, as a source: their header, tensors and model, read with every bound checked.
//!
//! [`Checkpoint`](crate::Checkpoint) opens such a file as it opens a directory: tensors come under their Hugging Face names and in
//! that layout (module `model`), dequantized to F32 where they are quantized ([`blocks`]); `config.json` and the tokenizer's files
//! are made from the metadata. Specification: `docs/gguf.md` of ggml. Versions 2 and 3, little-endian.

pub mod blocks;
pub(crate) mod model;
mod tokenizer;

use crate::error::{Error, Result};
use blocks::BlockType;
use bytes::Bytes;
use memmap2::Mmap;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

const MAGIC: &[u8; 4] = b"GGUF";
/// Where tensors begin, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Dimensions of a tensor, as in ggml.
const MAX_DIMS: u32 = 4;
/// Bytes of a tensor's name. ggml has room for 64.
const MAX_NAME_BYTES: usize = 1024;
/// Arrays within arrays.
const MAX_DEPTH: u32 = 4;
/// A header is copied to memory; vocabularies of 256 k tokens make some 20 MB.
const MAX_HEADER_BYTES: usize = 1 << 30;

/// A metadata value. Arrays stay as they lie in the header until somebody asks for them.
#[derive(Debug, Clone)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array { kind: u32, len: usize, bytes: Range<usize> },
}

/// A tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name, as in `blk.0.attn_q.weight`.
    pub name: String,
    /// Shape, outermost first (the file has it the other way round).
    pub shape: Vec<usize>,
    /// Element type.
    pub block_type: BlockType,
    /// Its bytes within the file.
    pub range: Range<u64>,
}

/// The header of a GGUF file, validated against the file's length.
#[derive(Debug)]
pub struct Gguf {
    /// What errors call the file.
    what: String,
    header: Bytes,
    values: BTreeMap<String, Value>,
    tensors: Vec<GgufTensor>,
}

/// Whether `path` is a file that claims to be GGUF, by its first bytes or its name.
pub fn is_gguf(path: &Path) -> bool {
    path.is_file() && (path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) || has_magic(path))
}

fn has_magic(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic)).is_ok() && magic == *MAGIC
}

impl Gguf {
    /// Reads the header of a file.
    pub fn open(path: &Path, file: &File) -> Result<Self> {
        let io_error = |e| Error::io(path, e);
        let what = path.display().to_string();
        if file.metadata().map_err(io_error)?.len() == 0 {
            return Err(Error::format(what, "it is empty, not GGUF"));
        }
        // SAFETY: the map is read-only and dropped before this function returns. Another process that rewrites the file in
        // place can change the bytes, as for every mapped file; whatever they are, the parser stays in bounds.
        let map = unsafe { Mmap::map(file) }.map_err(io_error)?;
        Self::parse(&what, &map)
    }

    /// Parses a whole file's bytes; `what` names it in errors.
    ///
    /// # Errors
    /// Bytes that are not GGUF, are truncated, or contradict themselves; a version, byte order or element type that is not
    /// supported.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { what, bytes, at: 0 };
        let bad = |problem: String| Error::format(what, problem);
        if reader.take(4, "the magic")? != MAGIC {
            return Err(bad("its first bytes are not `GGUF`: it is damaged, or not a GGUF file".into()));
        }
        match reader.u32("the version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(Error::unsupported(what, "it is a big-endian GGUF file; only little-endian ones are read"));
            }
            version => {
                return Err(Error::unsupported(what, format!("it is GGUF version {version}; 2 and 3 are supported")));
            }
        }
        // An entry takes at least this many bytes: what cannot fit is refused before anything is allocated.
        let n_tensors = reader.count("tensors", 24)?;
        let n_values = reader.count("metadata values", 13)?;
        let mut values = BTreeMap::new();
        for _ in 0..n_values {
            let key = reader.text("a metadata key")?.to_owned();
            let kind = reader.u32("a metadata type")?;
            let value = reader.value(kind).map_err(|e| e.within(format_args!("metadata `{key}`")))?;
            if values.insert(key.clone(), value).is_some() {
                return Err(bad(format!("metadata `{key}` occurs twice")));
            }
        }
        let alignment = match values.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= MAX_ALIGNMENT => *n,
            Some(other) => {
                return Err(bad(format!(
                    "general.alignment is {other:?}; a power of two up to {MAX_ALIGNMENT} expected"
                )));
            }
        };
        let mut tensors: Vec<GgufTensor> = Vec::new();
        for _ in 0..n_tensors {
            let tensor = reader.tensor(alignment)?;
            tensors.push(tensor);
        }
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        if reader.at > MAX_HEADER_BYTES {
            return Err(bad(format!("its header has {} bytes; at most {MAX_HEADER_BYTES} are read", reader.at)));
        }
        let mut names = HashSet::new();
        for tensor in &mut tensors {
            let place = |offset: u64| data_start.checked_add(offset).filter(|end| *end <= bytes.len() as u64);
            match place(tensor.range.start).zip(place(tensor.range.end)) {
                Some((start, end)) => tensor.range = start..end,
                None => {
                    return Err(bad(format!(
                        "tensor `{}` ends at byte {} of the data, but the file has {} bytes of them: it is truncated, or \
                         its offset is wrong",
                        tensor.name,
                        tensor.range.end,
                        (bytes.len() as u64).saturating_sub(data_start)
                    )));
                }
            }
            if !names.insert(tensor.name.clone()) {
                return Err(bad(format!("tensor `{}` occurs twice", tensor.name)));
            }
        }
        let mut by_offset: Vec<&GgufTensor> = tensors.iter().collect();
        by_offset.sort_by_key(|t| t.range.start);
        if let Some(pair) = by_offset.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            return Err(bad(format!("the tensors `{}` and `{}` overlap", pair[0].name, pair[1].name)));
        }
        let header = Bytes::copy_from_slice(&bytes[..reader.at]);
        Ok(Self { what: what.into(), header, values, tensors })
    }

    /// The tensors, in the order of the header.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor of that name.
    fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    fn bad(&self, key: &str, expected: &str) -> Error {
        let found = match self.values.get(key) {
            Some(Value::Array { len, .. }) => format!("an array of {len} values"),
            Some(value) => format!("{value:?}"),
            None => "missing".into(),
        };
        Error::format(&self.what, format!("metadata `{key}` is {found}; {expected} expected"))
    }

    /// A text; `None` where the key is absent.
    fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.bad(key, "a text")),
        }
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.bad(key, "true or false")),
        }
    }

    /// An integer that is not negative.
    fn size(&self, key: &str) -> Result<Option<usize>> {
        let number = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(n)) => usize::try_from(*n).ok(),
            Some(Value::Signed(n)) => usize::try_from(*n).ok(),
            Some(_) => None,
        };
        number.map(Some).ok_or_else(|| self.bad(key, "one number that is not negative"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(_) => Err(self.bad(key, "a floating-point number")),
        }
    }

    /// The elements of an array; `None` where the key is absent.
    fn array<T>(&self, key: &str, expected: &str, read: impl Fn(Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        let (kind, len, bytes) = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::Array { kind, len, bytes }) => (*kind, *len, bytes.clone()),
            Some(_) => return Err(self.bad(key, expected)),
        };
        let mut reader = Reader { what: &self.what, bytes: &self.header[..bytes.end], at: bytes.start };
        let mut out = Vec::with_capacity(len);
        for _ in 0..len {
            out.push(read(reader.value(kind)?).ok_or_else(|| self.bad(key, expected))?);
        }
        Ok(Some(out))
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.array(key, "an array of texts", |value| if let Value::Text(text) = value { Some(text) } else { None })
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.array(key, "an array of numbers", |value| match value {
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            Value::Float(x) => Some(x),
            _ => None,
        })
    }
}

/// Reads little-endian values and never past the end.
struct Reader<'a> {
    what: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn bad(&self, problem: String) -> Error {
        Error::format(self.what, problem)
    }

    fn take(&mut self, n: usize, of: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..n) else {
            return Err(self.bad(format!(
                "{of} at byte {} takes {n} bytes, but {} are left: it is truncated or damaged",
                self.at,
                rest.len()
            )));
        };
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, of: &str) -> Result<[u8; N]> {
        Ok(self.take(N, of)?.try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self, of: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(of)?))
    }

    fn u64(&mut self, of: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(of)?))
    }

    /// A number of things that take at least `min_bytes` each.
    fn count(&mut self, of: &str, min_bytes: usize) -> Result<usize> {
        let n = self.u64(of)?;
        let room = (self.bytes.len() - self.at) / min_bytes;
        match usize::try_from(n) {
            Ok(n) if n <= room => Ok(n),
            _ => Err(self.bad(format!("it promises {n} {of}, but has room for {room}: it is truncated or damaged"))),
        }
    }

    fn text(&mut self, of: &str) -> Result<&'a str> {
        let len = self.count("bytes of text", 1)?;
        std::str::from_utf8(self.take(len, of)?).map_err(|_| self.bad(format!("{of} is not UTF-8")))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        const OF: &str = "a value";
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(OF)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(OF)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(OF)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(OF)?).into()),
            4 => Value::Unsigned(self.u32(OF)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(OF)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(OF)?).into()),
            7 => match self.array::<1>(OF)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.bad(format!("a boolean is {other}; 0 or 1 expected"))),
            },
            8 => Value::Text(self.text("a text")?.into()),
            9 => {
                let kind = self.u32("an array's type")?;
                let len = self.count("array elements", min_bytes(kind).ok_or_else(|| self.unknown(kind))?)?;
                let start = self.at;
                self.skip(kind, len, MAX_DEPTH)?;
                Value::Array { kind, len, bytes: start..self.at }
            }
            10 => Value::Unsigned(self.u64(OF)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(OF)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(OF)?)),
            other => return Err(self.unknown(other)),
        })
    }

    /// Goes past `len` values.
    fn skip(&mut self, kind: u32, len: usize, depth: u32) -> Result<()> {
        match kind {
            8 => (0..len).try_for_each(|_| self.text("a text").map(drop)),
            9 if depth == 0 => Err(self.bad(format!("arrays lie more than {MAX_DEPTH} deep"))),
            9 => (0..len).try_for_each(|_| {
                let kind = self.u32("an array's type")?;
                let len = self.count("array elements", min_bytes(kind).ok_or_else(|| self.unknown(kind))?)?;
                self.skip(kind, len, depth - 1)
            }),
            // `count` made sure that this does not overflow.
            _ => self.take(len * min_bytes(kind).ok_or_else(|| self.unknown(kind))?, "an array").map(drop),
        }
    }

    fn unknown(&self, kind: u32) -> Error {
        self.bad(format!("a metadata value has the unknown type {kind}; 0 to 12 expected"))
    }

    /// A tensor's entry; its range is yet relative to the data.
    fn tensor(&mut self, alignment: u64) -> Result<GgufTensor> {
        let name = self.text("a tensor's name")?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(self.bad(format!("a tensor's name has {} bytes; 1 to {MAX_NAME_BYTES} expected", name.len())));
        }
        let what = self.what;
        let bad = |problem: String| Err(Error::format(what, format!("tensor `{name}`: {problem}")));
        let n_dims = self.u32("a tensor's dimensions")?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return bad(format!("it has {n_dims} dimensions; 1 to {MAX_DIMS} expected"));
        }
        let mut shape = Vec::new();
        let mut n_elements = Some(1u64);
        for _ in 0..n_dims {
            let dim = self.u64("a tensor's dimension")?;
            n_elements = n_elements.and_then(|n| n.checked_mul(dim));
            shape.push(usize::try_from(dim).unwrap_or(0));
        }
        let number = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let Some(block_type) = BlockType::from_number(number) else {
            let known = BlockType::ALL.map(|(_, t)| t.name()).join(", ");
            return Err(Error::unsupported(
                self.what,
                format!("tensor `{name}` has element type {number}, which is not supported; supported are {known}"),
            ));
        };
        let block = block_type.block_weights();
        if shape.contains(&0) || !shape[0].is_multiple_of(block) {
            return bad(format!(
                "its shape (innermost first) is {shape:?}; {block_type:?} takes rows of whole blocks of {block}"
            ));
        }
        let n_bytes = n_elements.and_then(|n| (n / block as u64).checked_mul(block_type.block_bytes() as u64));
        // Values are computed as float32: those must be countable too.
        let n_bytes = n_bytes.filter(|_| n_elements.is_some_and(|n| n <= (usize::MAX / 4) as u64));
        let end = n_bytes.and_then(|n| offset.checked_add(n));
        let Some(end) = end else {
            return bad(format!("its shape (innermost first) is {shape:?}, which is more than a file can hold"));
        };
        if !offset.is_multiple_of(alignment) {
            return bad(format!("it starts at byte {offset} of the data, not a multiple of {alignment}"));
        }
        shape.reverse();
        Ok(GgufTensor { name: name.into(), shape, block_type, range: offset..end })
    }
}

/// The least bytes that a metadata value of this type takes; `None` for an unknown type.
fn min_bytes(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 => 8,
        9 => 12,
        10..=12 => 8,
        _ => return None,
    })
}
