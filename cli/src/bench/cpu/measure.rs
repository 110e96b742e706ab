//! Measures: the contenders take turns, and their medians are compared.

use super::super::peers::{Int8Matrix, read_memory};
use super::super::workload::{Matrix, encode_options};
use super::{Bench, Result, Scratch, Work, room, zstd_frames};
use codecllm_codec::checkpoint::{Dtype, Tensor};
use codecllm_codec::encoded::{Checks, encode_tensor};
use codecllm_codec::{Cpu, Prefer};
use codecllm_engine::{LoadOptions, Logits, Model};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Weights of the matrix that encoders are measured on, at most, where there is a choice.
const ENCODE_MAX_WEIGHTS: usize = 1 << 24;
/// Positions of the caches that generation is measured with.
const GENERATE_CAPACITY: usize = 256;
/// One figure. Bigger is better.
#[derive(Serialize)]
pub struct Measurement {
    pub name: String,
    pub threads: usize,
    /// The median over the rounds.
    pub value: f64,
    pub unit: &'static str,
    /// `value` over the peer's; where the peer is `memory.read` and the unit is another, the bytes/s over the peer's.
    pub ratio: f64,
    pub ratio_to: String,
    /// Largest less smallest round, over the median.
    pub spread: f64,
    /// Bytes of the weights, in the form at hand, that were read.
    pub bytes_per_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// Passes over all of a model's matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passes_per_s: Option<f64>,
}

/// What a contender's figure is compared with.
struct Peer {
    name: String,
    threads: usize,
    basis: Basis,
}

enum Basis {
    /// The two values.
    Value,
    /// The bytes that both read a second.
    Bytes,
    /// Tokens/s against passes/s over the matrices.
    Passes,
}

struct Contender<'a> {
    name: String,
    threads: usize,
    unit: &'static str,
    /// Bytes read for each unit of the value.
    bytes_per_unit: f64,
    bits_per_weight: Option<f64>,
    has_passes: bool,
    peer: Peer,
    /// Measures for about so many seconds: units a second.
    run: Box<dyn FnMut(f64) -> Result<f64> + 'a>,
    rounds: Vec<f64>,
}

impl Bench {
    /// Runs all contenders in turns and compares their medians.
    pub fn measure(&self, seconds: f64, n_rounds: usize, memory_bytes: usize) -> Result<Vec<Measurement>> {
        let memory = vec![1u64; memory_bytes / size_of::<u64>()];
        let models = self.models()?;
        let thread_counts = if self.n_threads == 1 { vec![1] } else { vec![1, self.n_threads] };
        let pools = thread_counts
            .iter()
            .map(|&n| Ok(Team { pool: ThreadPoolBuilder::new().num_threads(n).build()?, scratch: scratch(n) }))
            .collect::<Result<Vec<_>>>()?;
        let mut contenders = Vec::new();
        for team in &pools {
            self.add_memory(&mut contenders, team, &memory);
            self.add_sweeps(&mut contenders, team);
        }
        let team = pools.last().expect("one pool at least");
        self.add_encoders(&mut contenders, team)?;
        for (name, model, bits_per_weight) in &models {
            contenders.push(self.generation(name, model, *bits_per_weight));
        }

        for round in 1..=n_rounds {
            eprintln!("round {round} of {n_rounds}");
            for contender in &mut contenders {
                let value = (contender.run)(seconds)?;
                contender.rounds.push(value);
            }
        }
        Ok(compare(&mut contenders, self.workload.weights_per_pass()))
    }

    fn add_memory<'a>(&'a self, contenders: &mut Vec<Contender<'a>>, team: &'a Team, memory: &'a [u64]) {
        let read = move |n_streams: usize, prefetch: bool, bytes: usize| {
            let part = (bytes / size_of::<u64>()).min(memory.len()) / team.n_threads();
            let start = Instant::now();
            team.pool.broadcast(|thread| {
                let words = &memory[thread.index() * part..][..part];
                black_box(read_memory(words, n_streams, prefetch));
            });
            (part * team.n_threads() * size_of::<u64>()) as f64 / start.elapsed().as_secs_f64()
        };
        let all = size_of_val(memory);
        let ways = [1, 2, 4, 8, 16].into_iter().flat_map(|n_streams| [(n_streams, false), (n_streams, true)]);
        let (best, _) = ways
            .map(|(n_streams, prefetch)| ((n_streams, prefetch), read(n_streams, prefetch, all / 4)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .expect("several ways");
        contenders.push(Contender {
            bytes_per_unit: 1.0,
            peer: Peer { name: "memory.read".into(), threads: 1, basis: Basis::Value },
            ..Contender::new("memory.read", team, "bytes/s", move |seconds| {
                let start = Instant::now();
                let mut rates = Vec::new();
                while rates.is_empty() || start.elapsed().as_secs_f64() < seconds {
                    rates.push(read(best.0, best.1, all));
                }
                // The mean over the time: of rates over equal amounts, the harmonic one.
                Ok(rates.len() as f64 / rates.iter().map(|r| 1.0 / r).sum::<f64>())
            })
        });
    }

    /// The contenders that go over the workload's matrices, and zstd.
    fn add_sweeps<'a>(&'a self, contenders: &mut Vec<Contender<'a>>, team: &'a Team) {
        let bf16 = |name: &str| Peer { name: name.into(), threads: team.n_threads(), basis: Basis::Value };
        let mut add = |name: String, bits_per_weight: f64, is_product: bool, peer: Peer, work: Work<'a>| {
            let mut next = vec![0; self.workload.kinds.len()];
            contenders.push(Contender {
                bytes_per_unit: bits_per_weight / 8.0,
                bits_per_weight: Some(bits_per_weight),
                has_passes: is_product,
                peer,
                ..Contender::new(&name, team, "weights/s", move |seconds| self.sweep(team, &mut next, seconds, &work))
            });
        };
        let memory = Peer { name: "memory.read".into(), threads: team.n_threads(), basis: Basis::Bytes };
        add("matvec.bf16".into(), 16.0, true, memory, self.matvec_bf16());
        let n_weights: usize = self.workload.matrices.iter().map(Matrix::n_weights).sum();
        let int8_bytes: usize = self.int8[..self.workload.matrices.len()].iter().map(Int8Matrix::bytes).sum();
        let int8_bits = 8.0 * int8_bytes as f64 / n_weights as f64;
        add("matvec.int8".into(), int8_bits, true, bf16("matvec.bf16"), self.matvec_int8());
        for encoded in &self.encoded {
            let name = format!("matvec.encoded.{}", encoded.form);
            add(name, encoded.bits_per_weight, true, bf16("matvec.bf16"), self.matvec_encoded(encoded));
        }
        for encoded in &self.encoded {
            for cpu in Cpu::available() {
                let name = format!("decode.{}.{cpu}", encoded.form);
                add(name, encoded.bits_per_weight, false, bf16("decode.zstd"), self.decode(encoded, cpu));
            }
        }

        let n_codes: usize = self.zstd.iter().map(|(_, n)| n).sum();
        let bytes: usize = self.zstd.iter().map(|(frame, _)| frame.len()).sum();
        let bits_per_weight = 8.0 * bytes as f64 / n_codes as f64;
        contenders.push(Contender {
            bytes_per_unit: bits_per_weight / 8.0,
            bits_per_weight: Some(bits_per_weight),
            peer: Peer { name: "memory.read".into(), threads: team.n_threads(), basis: Basis::Bytes },
            ..Contender::new("decode.zstd", team, "weights/s", move |seconds| {
                let mut n_done = 0;
                let start = Instant::now();
                while n_done == 0 || start.elapsed().as_secs_f64() < seconds {
                    team.share(&self.zstd, |(frame, n), scratch| {
                        zstd::bulk::decompress_to_buffer(frame, room(&mut scratch.codes, *n))?;
                        Ok(())
                    })?;
                    n_done += n_codes;
                }
                Ok(n_done as f64 / start.elapsed().as_secs_f64())
            })
        });
    }

    /// Goes over groups of every kind in turn for about `seconds`, from where the last sweep stopped: weights a second
    /// over a whole pass.
    fn sweep(&self, team: &Team, next: &mut [usize], seconds: f64, work: &Work<'_>) -> Result<f64> {
        let kinds = &self.workload.kinds;
        let mut elapsed_s = vec![0.0; kinds.len()];
        let mut n_turns = 0;
        let start = Instant::now();
        while n_turns == 0 || start.elapsed().as_secs_f64() < seconds {
            for ((kind, next), elapsed_s) in kinds.iter().zip(&mut *next).zip(&mut elapsed_s) {
                let group = &kind.groups[*next % kind.groups.len()];
                *next += 1;
                let start = Instant::now();
                team.share(&group.tasks, work)?;
                *elapsed_s += start.elapsed().as_secs_f64();
            }
            n_turns += 1;
        }
        let pass_s: f64 = kinds.iter().zip(&elapsed_s).map(|(k, s)| k.per_pass as f64 * s / f64::from(n_turns)).sum();
        Ok(self.workload.weights_per_pass() as f64 / pass_s)
    }

    fn add_encoders<'a>(&'a self, contenders: &mut Vec<Contender<'a>>, team: &'a Team) -> Result<()> {
        let matrices = &self.workload.matrices;
        let fits = matrices.iter().filter(|m| m.n_weights() <= ENCODE_MAX_WEIGHTS);
        let matrix = fits.max_by_key(|m| m.n_weights()).unwrap_or(&matrices[0]);
        let tensor = matrix.tensor();
        let codes: Vec<u8> = self.zstd_codes()?;
        let peer = |name: &str| Peer { name: name.into(), threads: team.n_threads(), basis: Basis::Value };
        for encoded in &self.encoded {
            let options = encode_options(encoded.form, Prefer::Balanced, &tensor)?;
            let tensor = tensor.clone();
            contenders.push(Contender {
                bytes_per_unit: 2.0,
                peer: peer("encode.zstd"),
                ..Contender::new(&format!("encode.{}", encoded.form), team, "weights/s", move |seconds| {
                    repeat(seconds, matrix.n_weights(), || {
                        black_box(team.pool.install(|| encode_tensor(&tensor, &options))?);
                        Ok(())
                    })
                })
            });
        }
        contenders.push(Contender {
            bytes_per_unit: 1.0,
            peer: peer("encode.zstd"),
            ..Contender::new("encode.zstd", team, "weights/s", move |seconds| {
                repeat(seconds, codes.len(), || {
                    black_box(team.pool.install(|| zstd_frames(&codes))?);
                    Ok(())
                })
            })
        });
        Ok(())
    }

    /// Some INT8 codes.
    fn zstd_codes(&self) -> Result<Vec<u8>> {
        let frames = &self.zstd[..self.zstd.len().min(64)];
        let codes =
            frames.iter().map(|(frame, n)| Ok(zstd::bulk::decompress(frame, *n)?)).collect::<Result<Vec<_>>>()?;
        Ok(codes.concat())
    }

    /// The whole model in BF16 and in each format: name, model, bits of a matrix's weight.
    fn models(&self) -> Result<Vec<(String, Model, f64)>> {
        let Some(whole) = &self.workload.model else { return Ok(Vec::new()) };
        let options = LoadOptions { cpu: self.level, threads: self.n_threads, check: Checks::Metadata };
        let load = |matrix: &dyn Fn(usize) -> Tensor| -> Result<Model> {
            let mut tensors = whole.others.clone();
            let names = self.workload.matrices.iter().map(|m| m.name.clone()).enumerate();
            for (i, name) in names.chain(whole.aliases.iter().map(|(name, i)| (*i, name.clone()))) {
                tensors.insert(name, matrix(i));
            }
            Ok(Model::from_source(whole.config.clone(), &tensors, &options)?)
        };
        eprintln!("loading the whole model in each form");
        let mut models = vec![("generate.bf16".to_string(), load(&|i| self.workload.matrices[i].tensor())?, 16.0)];
        for encoded in &self.encoded {
            let model = load(&|i| {
                let data = encoded.matrices[i].bytes().clone();
                Tensor { name: self.workload.matrices[i].name.clone(), dtype: Dtype::U8, shape: vec![data.len()], data }
            })?;
            models.push((format!("generate.encoded.{}", encoded.form), model, encoded.bits_per_weight));
        }
        Ok(models)
    }

    fn generation<'a>(&'a self, name: &str, model: &'a Model, bits_per_weight: f64) -> Contender<'a> {
        let (peer, basis) =
            if name == "generate.bf16" { ("matvec.bf16", Basis::Passes) } else { ("generate.bf16", Basis::Value) };
        let run = move |seconds: f64| -> Result<f64> {
            let mut cache = model.new_cache(GENERATE_CAPACITY.min(model.config().max_positions))?;
            let mut token = 1 % model.config().vocab_size as u32;
            let mut n_tokens = 0;
            let start = Instant::now();
            while n_tokens < 2 || start.elapsed().as_secs_f64() < seconds {
                if cache.len() == cache.capacity() {
                    cache.reset();
                }
                let logits = model.forward(&[token], &mut cache, Logits::Last)?;
                token = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32;
                n_tokens += 1;
            }
            Ok(f64::from(n_tokens) / start.elapsed().as_secs_f64())
        };
        Contender {
            name: name.into(),
            threads: self.n_threads,
            unit: "tokens/s",
            bytes_per_unit: self.workload.weights_per_pass() as f64 * bits_per_weight / 8.0,
            bits_per_weight: Some(bits_per_weight),
            has_passes: false,
            peer: Peer { name: peer.into(), threads: self.n_threads, basis },
            run: Box::new(run),
            rounds: Vec::new(),
        }
    }
}

impl<'a> Contender<'a> {
    fn new(name: &str, team: &Team, unit: &'static str, run: impl FnMut(f64) -> Result<f64> + 'a) -> Self {
        let threads = team.n_threads();
        Self {
            name: name.into(),
            threads,
            unit,
            bytes_per_unit: 1.0,
            bits_per_weight: None,
            has_passes: false,
            peer: Peer { name: name.into(), threads, basis: Basis::Value },
            run: Box::new(run),
            rounds: Vec::new(),
        }
    }
}

/// Threads that share tasks, each with its own scratch.
struct Team {
    pool: ThreadPool,
    scratch: Vec<Mutex<Scratch>>,
}

fn scratch(n: usize) -> Vec<Mutex<Scratch>> {
    std::iter::repeat_with(Mutex::default).take(n).collect()
}

impl Team {
    fn n_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Works off `tasks`, each thread taking the next.
    fn share<T: Sync>(&self, tasks: &[T], work: impl Fn(&T, &mut Scratch) -> Result<()> + Sync) -> Result<()> {
        let next = AtomicUsize::new(0);
        let results = self.pool.broadcast(|thread| {
            let mut scratch = self.scratch[thread.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(task, &mut scratch)?;
                black_box(&mut *scratch);
            }
            Ok(())
        });
        results.into_iter().collect()
    }
}

/// Repeats `work` for about `seconds`: units a second.
fn repeat(seconds: f64, units: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut n = 0;
    let start = Instant::now();
    while n == 0 || start.elapsed().as_secs_f64() < seconds {
        work()?;
        n += 1;
    }
    Ok((n * units) as f64 / start.elapsed().as_secs_f64())
}

/// The medians, each with its ratio to the peer's, sorted by name.
fn compare(contenders: &mut [Contender<'_>], weights_per_pass: usize) -> Vec<Measurement> {
    for contender in &mut *contenders {
        contender.rounds.sort_by(f64::total_cmp);
    }
    let median = |c: &Contender<'_>| c.rounds[c.rounds.len() / 2];
    contenders
        .iter()
        .map(|c| {
            let value = median(c);
            let peer = contenders.iter().find(|p| p.name == c.peer.name && p.threads == c.peer.threads).unwrap_or(c);
            let ratio = match c.peer.basis {
                Basis::Value => value / median(peer),
                Basis::Bytes => value * c.bytes_per_unit / (median(peer) * peer.bytes_per_unit),
                Basis::Passes => value * weights_per_pass as f64 / median(peer),
            };
            Measurement {
                name: c.name.clone(),
                threads: c.threads,
                value,
                unit: c.unit,
                ratio,
                ratio_to: if c.peer.threads == c.threads {
                    peer.name.clone()
                } else {
                    format!("{} with {} thread", peer.name, peer.threads)
                },
                spread: (c.rounds[c.rounds.len() - 1] - c.rounds[0]) / value,
                bytes_per_s: value * c.bytes_per_unit,
                bits_per_weight: c.bits_per_weight,
                passes_per_s: c.has_passes.then(|| value / weights_per_pass as f64),
            }
        })
        .collect()
}
