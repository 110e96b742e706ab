//! speed
use codecllm_codec::encoded::CodesMut;
use codecllm_codec::*;
use std::time::Instant;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (r, c) = (std::env::args().nth(2).map_or(5632, |a| a.parse().unwrap()), 2048usize);
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
            let h: f32 = (0..8).map(|_| nx()).sum();
            half::bf16::from_f32(g * 0.03 * (1.0 + 0.05 * h * h)).to_le_bytes()
        })
        .collect();
    let t = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![r, c], data: v.into() };
    let x: Vec<f32> = (0..c).map(|i| (i as f32 * 0.1).sin()).collect();
    let o = Operand::new(&x, c);
    for format in [Format::Int8, Format::Bf16, Format::Fp8] {
        if args.len() > 1 && format.name() != args[1] {
            continue;
        }
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
                if cpu == Cpu::Scalar {
                    continue;
                }
                let mut best = [f64::MAX; 2];
                let mut y = vec![0f32; r];
                let mut o8 = vec![0u8; r * c];
                let mut o16 = vec![0u16; r * c];
                for _ in 0..15 {
                    let s = Instant::now();
                    let out = if format == Format::Bf16 { CodesMut::U16(&mut o16) } else { CodesMut::U8(&mut o8) };
                    e.decode_codes_into(cpu, 0..r, out).unwrap();
                    best[0] = best[0].min(s.elapsed().as_secs_f64());
                    let s = Instant::now();
                    e.product(cpu, &o, 0..r, &mut y).unwrap();
                    best[1] = best[1].min(s.elapsed().as_secs_f64());
                }
                println!(
                    "  {cpu}: decode {:.2} Gw/s, product {:.2} Gw/s",
                    (r * c) as f64 / best[0] / 1e9,
                    (r * c) as f64 / best[1] / 1e9
                );
            }
        }
    }
}
