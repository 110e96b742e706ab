//! Writes one safetensors file whose tensors' sizes are known only as they are written.

use crate::checkpoint::{Dtype, Shard, TensorInfo};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;

/// Tensors' data begin at a multiple of this within the file.
const DATA_ALIGN: u64 = 64;
const LENGTH_BYTES: u64 = 8;

/// A safetensors file in the making: room for the header first, then the data, the header last.
pub(super) struct ShardWriter {
    path: PathBuf,
    file: File,
    header: Map<String, Value>,
    /// Where the data begin.
    data_start: u64,
    /// Bytes of data written.
    n_bytes: u64,
}

impl ShardWriter {
    /// Creates `path` with room for the header of `tensors`, of which those that `is_encoded` will be bytes.
    pub(super) fn create<'a>(
        path: PathBuf,
        source: &Shard,
        tensors: impl Iterator<Item = &'a TensorInfo>,
        is_encoded: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut header = Map::new();
        if !source.metadata.is_empty() {
            header.insert("__metadata__".into(), json!(source.metadata));
        }
        let mut longest = header.clone();
        for tensor in tensors {
            let entry = match is_encoded(&tensor.name) {
                true => entry(Dtype::U8, &[usize::MAX], u64::MAX, u64::MAX),
                false => entry(tensor.dtype, &tensor.shape, u64::MAX, u64::MAX),
            };
            longest.insert(tensor.name.clone(), entry);
        }
        let data_start = (LENGTH_BYTES + json_bytes(&longest).len() as u64).next_multiple_of(DATA_ALIGN);
        let mut file = File::create(&path).map_err(|e| Error::io(&path, e))?;
        file.seek(SeekFrom::Start(data_start)).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file, header, data_start, n_bytes: 0 })
    }

    /// Appends a tensor.
    pub(super) fn append(&mut self, name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<()> {
        let end = self.n_bytes + data.len() as u64;
        self.header.insert(name.into(), entry(dtype, shape, self.n_bytes, end));
        self.file.write_all(data).map_err(|e| Error::io(&self.path, e))?;
        self.n_bytes = end;
        Ok(())
    }

    /// Writes the header and brings everything to the disk.
    pub(super) fn finish(mut self) -> Result<()> {
        let mut header = json_bytes(&self.header);
        // Spaces fill the room that shorter numbers left.
        header.resize((self.data_start - LENGTH_BYTES) as usize, b' ');
        let mut write = || -> io::Result<()> {
            self.file.rewind()?;
            self.file.write_all(&(header.len() as u64).to_le_bytes())?;
            self.file.write_all(&header)?;
            self.file.sync_all()
        };
        write().map_err(|e| Error::io(&self.path, e))
    }
}

fn entry(dtype: Dtype, shape: &[usize], start: u64, end: u64) -> Value {
    json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end]})
}

fn json_bytes(header: &Map<String, Value>) -> Vec<u8> {
    serde_json::to_vec(header).expect("keys are strings and no value fails to serialize")
}
