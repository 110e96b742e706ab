//! speed
use codecllm_codec::*;
use std::time::Instant;
fn main() {
    let (r, c) = (5632usize, 2048usize);
    let mut s = 88172645463325252u64;
    let mut nx = move || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let v: Vec<u8> = (0..r * c)
        .flat_map(|_| {
            let g: f32 = (0..8).map(|_| nx()).sum();
            half::bf16::from_f32(g * 0.03).to_le_bytes()
        })
        .collect();
    let t = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![r, c], data: v.into() };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let x: Vec<f32> = (0..c).map(|i| (i as f32 * 0.1).sin()).collect();
    let o = Operand::new(&x, c);
    let x32: Vec<f32> = (0..c * 32).map(|i| (i as f32 * 0.1).sin()).collect();
    let o32 = Operand::new(&x32, c);
    for format in [Format::Int8, Format::Bf16, Format::Fp8] {
        for prefer in [Prefer::Balanced, Prefer::Speed] {
            let s = Instant::now();
            let b = encode_tensor(&t, &EncodeOptions { format, prefer, ..Default::default() }).unwrap();
            let es = s.elapsed().as_secs_f64();
            let e = EncodedTensor::parse(b.into(), Checks::Full).unwrap();
            println!(
                "{format} {prefer:?} {:?} {:.3} bits, encode {:.0} MB/s",
                e.params().unwrap(),
                e.bytes().len() as f64 * 8.0 / (r * c) as f64,
                (2 * r * c) as f64 / es / 1e6
            );
            for cpu in Cpu::available() {
                let mut best = [f64::MAX; 3];
                let mut y = vec![0f32; r];
                let mut y32 = vec![0f32; r * 32];
                for _ in 0..if cpu == Cpu::Scalar { 1 } else { 7 } {
                    let s = Instant::now();
                    pool.install(|| e.decode_codes(cpu).unwrap());
                    best[0] = best[0].min(s.elapsed().as_secs_f64());
                    let s = Instant::now();
                    e.product(cpu, &o, 0..r, &mut y).unwrap();
                    best[1] = best[1].min(s.elapsed().as_secs_f64());
                    let s = Instant::now();
                    e.product(cpu, &o32, 0..r, &mut y32).unwrap();
                    best[2] = best[2].min(s.elapsed().as_secs_f64());
                }
                println!(
                    "  {cpu}: decode {:.2} Gw/s, product {:.2} Gw/s, product of 32 {:.1} GMAC/s",
                    (r * c) as f64 / best[0] / 1e9,
                    (r * c) as f64 / best[1] / 1e9,
                    (r * c * 32) as f64 / best[2] / 1e9
                );
            }
        }
    }
}
