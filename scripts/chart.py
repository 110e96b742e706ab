#!/usr/bin/env python3
"""Draws what `codecllm bench --device cuda --json` measured, as an SVG.

    codecllm bench --device cuda --json > bench.json; scripts/chart.py bench.json > assets/gpu.svg
"""

import json
import sys

FORMATS = {"rate": "#1b7f5c", "rate-trellis": "#7cb9a0", "int8": "#2f6db5", "bf16": "#b5652f", "fp8": "#7a4fa3"}
WIDTH, LEFT, RIGHT, BAR, GAP = 760, 150, 110, 11, 12


def groups(report):
    """Title and rows (name, {format: (ratio, text)}) of each panel."""
    products = {}
    for r in (report.get("kernels") or {}).get("results", []):
        if r["operation"] == "product" and r.get("tokens") == 1:
            shape = products.setdefault((r["n_rows"], r["n_cols"]), {"cublas": [], "encoded": {}})
            if r["name"] == "cublas":
                shape["cublas"].append(r["elapsed_s"])
            elif r["name"] == "encoded":
                shape["encoded"][r["format"]] = r["elapsed_s"]
    rows = []
    for (n_rows, n_cols), shape in products.items():
        peer = min(shape["cublas"])
        rows.append((f"{n_rows}×{n_cols}", {f: (peer / s, f"{s * 1e6:.1f} µs") for f, s in shape["encoded"].items()}))
    yield "One matrix, one token: speed against cuBLAS in BF16", rows
    rows = []
    for model in report.get("models", []):
        plain = next(r for r in model["results"] if r["name"] == "bf16 plain")
        encoded = [r for r in model["results"] if r["name"].startswith("encoded ")]
        rate = lambda r: (r["generate_tok_per_s"] / plain["generate_tok_per_s"], f"{r['generate_tok_per_s']:.0f} tok/s")
        rows.append((model["model_shape"], {r["name"].split()[1]: rate(r) for r in encoded}))
    yield "Whole model, one token at a time: speed against this engine in BF16", rows


def main():
    report = json.load(open(sys.argv[1]))
    panels = [(title, rows) for title, rows in groups(report) if rows]
    most = max(ratio for _, rows in panels for _, bars in rows for ratio, _ in bars.values())
    scale = (WIDTH - LEFT - RIGHT) / max(most, 1)
    body, y = [], 24
    text = lambda x, y, s, more="": body.append(f'<text x="{x:.0f}" y="{y:.0f}" {more}>{s}</text>')
    x = LEFT
    drawn = {format for _, rows in panels for _, bars in rows for format in bars}
    for name, color in FORMATS.items():
        if name not in drawn:
            continue
        body.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{color}"/>')
        text(x + 16, y, name)
        x += 40 + 7 * len(name)
    for title, rows in panels:
        y += 34
        text(8, y, title, 'font-weight="bold"')
        y += 12
        line, top = len(body), y
        for name, bars in rows:
            text(LEFT - 8, y + BAR * len(bars) / 2 + 4, name, 'text-anchor="end"')
            for format, color in FORMATS.items():
                if format not in bars:
                    continue
                ratio, label = bars[format]
                body.append(f'<rect x="{LEFT}" y="{y}" width="{ratio * scale:.1f}" height="{BAR - 1}" fill="{color}"/>')
                text(LEFT + ratio * scale + 4, y + BAR - 2, f"{ratio:.2f}× ({label})", 'font-size="9"')
                y += BAR
            y += GAP
        one = LEFT + scale
        body.insert(line, f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{y - GAP}" stroke="#555" stroke-dasharray="3 3"/>')
    text(8, y + 16, f"{report['device']}; the dashed line is BF16", 'fill="#555"')
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 28}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>'
    )


main()
