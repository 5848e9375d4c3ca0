"""The style of every page: quiet, in light and dark, on paper, and at any width."""

from __future__ import annotations

_LIGHT = (
    "--paper:#fcfcfa;--card:#fff;--ink:#1d2327;--soft:#586069;--rule:#e2e2dc;--link:#0b5e8a;"
    "--s0:#eef3f7;--s1:#d8e6ef;--s2:#bcd6e6;--s3:#98c1da;--s4:#6fa8cb;--s5:#4a8cb8;--s6:#2f6f9f;--s7:#1b5283;--s8:#0b3561;"
    "--d0:#0b4a7d;--d1:#3a78a8;--d2:#7ba8cb;--d3:#b9d1e3;--d4:#efeeea;--d5:#f2cfa8;--d6:#e3a35c;--d7:#c2742a;--d8:#8c4a0c;"
    "--l0:#0072b2;--l1:#c55a00;--l2:#00805c;--l3:#a8508a;--l4:#1d2327;--l5:#2f8fc4;--l6:#8a7300;--l7:#7b6b8f;--bar:#4a8cb8"
)
_DARK = (
    "--paper:#15181b;--card:#1b1f23;--ink:#e6e7e4;--soft:#a2a9ae;--rule:#30363b;--link:#7cc0ea;"
    "--s0:#20282f;--s1:#20384a;--s2:#214a66;--s3:#265f85;--s4:#3178a3;--s5:#4a93bd;--s6:#71afd2;--s7:#a2cbe3;--s8:#dceef8;"
    "--d0:#9bd0f3;--d1:#5fa3d0;--d2:#3c759c;--d3:#2b4a60;--d4:#2a2d30;--d5:#5a4127;--d6:#96642a;--d7:#d18d3a;--d8:#f8c98a;"
    "--l0:#56b4e9;--l1:#f0923c;--l2:#35c79b;--l3:#dd8fc0;--l4:#e6e7e4;--l5:#a8d8f5;--l6:#e6d24a;--l7:#b7a6cc;--bar:#4a93bd"
)
_DASHES = ("none", "6 3", "2 3", "8 3 2 3", "1 4", "10 4", "4 2 1 2 1 2", "3 6")


def sheet() -> str:
    """Return the style sheet."""
    fills = "".join(f".{kind}{level}{{fill:var(--{kind}{level})}}" for kind in "sd" for level in range(9))
    lines = "".join(
        f"polyline.l{i},.lines path.l{i}{{stroke:var(--l{i});stroke-dasharray:{dash}}}circle.l{i}{{fill:var(--l{i})}}"
        for i, dash in enumerate(_DASHES)
    )
    return (
        f":root{{color-scheme:light dark;{_LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
        + _PAGE + _FIGURES + fills + lines + _PRINT
    )  # fmt: skip


_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);-webkit-text-size-adjust:100%;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
header,main,footer{max-width:800px;margin:0 auto;padding:0 22px;overflow-wrap:anywhere}
header{padding-top:56px}
h1,h2,h3{font-weight:600;line-height:1.2;text-wrap:balance}
p,figcaption{text-wrap:pretty}
h1{font:600 34px/1.15 ui-serif,Charter,"Iowan Old Style",Georgia,"DejaVu Serif",serif;margin:6px 0 14px}
h2{font:600 23px/1.2 ui-serif,Charter,"Iowan Old Style",Georgia,"DejaVu Serif",serif;margin:0 0 8px}
h3{font-size:15px;margin:0 0 12px}
h4{font-size:13px;font-weight:600;margin:14px 0 4px;color:var(--soft)}
.kind{margin:0;color:var(--soft);font-size:14px}
.lead{font-size:19px;line-height:1.5;margin:0 0 26px;max-width:36em}
section{margin:52px 0 0}
section>p{margin:0 0 20px;max-width:40em}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:16px 24px;margin:0;padding:18px 0 0;
border-top:1px solid var(--rule)}
dl div{min-width:0}
dl div.long{grid-column:1/-1}
dt{font-size:13px;color:var(--soft)}
dd{margin:0;font-variant-numeric:tabular-nums}
code,.n,td.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}
footer{margin-top:64px;padding-top:16px;padding-bottom:40px;color:var(--soft);font-size:13px}
"""
_FIGURES = """
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,344px),1fr));gap:36px 32px;
align-items:start}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,226px),1fr));gap:28px;align-items:start}
.group{margin:36px 0 14px;padding-top:14px;border-top:1px solid var(--rule)}
.small h3{font-weight:400;font-size:14px;margin-bottom:6px}
.whole{margin-top:20px}
figure{margin:0;min-width:0}
figcaption{margin-top:12px;font-size:14px;line-height:1.5;color:var(--soft)}
svg{display:block;max-width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft);unicode-bidi:isolate}
svg text.n{fill:var(--ink);font-size:11px}
svg text.r{font-size:10px}
svg .e{text-anchor:end}
svg .m{text-anchor:middle}
svg .a{fill:var(--soft)}
.g{stroke:var(--rule);stroke-width:1}
.b{fill:var(--bar)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.lines path{fill:none;stroke-width:2}
circle{stroke:var(--paper);stroke-width:1}
svg path:hover{stroke:var(--ink);stroke-width:1.5}
.key{display:flex;align-items:center;gap:8px;margin-top:10px;font-size:12px;color:var(--soft)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:10px 0 0;padding:0;font-size:13px;
color:var(--soft)}
.legend li{display:flex;align-items:center;gap:6px;min-width:0}
.legend svg{flex:none}
.names{columns:2;margin:12px 0 0;padding-left:24px;font-size:12px;color:var(--soft)}
details{margin-top:10px;font-size:14px}
summary{cursor:pointer;color:var(--link);width:fit-content}
.scroll{overflow-x:auto;margin-top:8px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.whole table{width:100%}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);white-space:nowrap}
td.name{white-space:normal;overflow-wrap:anywhere;min-width:9em}
th{font-weight:600;color:var(--soft)}
.right{text-align:right}
"""
_PRINT = """
@media print{body{font-size:11pt;background:#fff}header{padding-top:0}section{margin-top:28pt}figure{break-inside:avoid}
details{display:none}svg *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@media (max-width:480px){table{font-size:12px}th{white-space:normal}th,td{padding-right:6px}td.name{min-width:3.8em}
header{padding-top:32px}h1{font-size:27px}.lead{font-size:17px}}
"""
