"""The look of the report page: light and dark, no fonts or scripts from elsewhere."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#667085;--line:#e3e6ec;--accent:#3056d3;--good:#13804b;--bad:#c0362c;
--c0:#3056d3;--c1:#d9772b;--c2:#13804b;--c3:#a03bb5;--c4:#0e8fa3;--c5:#8a6d1f}
@media(prefers-color-scheme:dark){:root{--bg:#11141a;--card:#1a1f28;--ink:#e8ebf1;--soft:#98a2b3;--line:#2c3340;--accent:#86a5ff;
--good:#54c98d;--bad:#ff8b80;--c0:#86a5ff;--c1:#f0a565;--c2:#54c98d;--c3:#d68be6;--c4:#5ccbdc;--c5:#d3b45b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:36px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:18px;margin:38px 0 12px}
h3{font-size:14px;margin:0 0 10px;color:var(--soft);font-weight:600}
p{margin:0 0 10px}.soft{color:var(--soft)}small{color:var(--soft)}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:22px 0 0}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile{display:flex;flex-direction:column;justify-content:space-between}
.tile b{display:block;font-size:26px;line-height:1.25;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.tile span{color:var(--soft);font-size:13px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:12px}
@media(max-width:520px){.two{grid-template-columns:1fr}}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px}
th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}tr.this td:first-child{font-weight:650}
td.best{font-weight:700;color:var(--good)}
tr.chance td{color:var(--soft)}
td.wide{width:40%;min-width:120px}
.meter{position:relative;display:block;height:8px;border-radius:4px;background:var(--line)}
.meter b{position:absolute;left:0;top:0;height:8px;border-radius:4px;background:var(--accent)}
.meter i{position:absolute;top:-3px;width:2px;height:14px;background:var(--ink)}
figure{margin:0 auto;max-width:720px}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11.5px}svg .grid{stroke:var(--line)}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .bar{opacity:.62}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.bar.c0{fill:var(--c0)}.bar.c1{fill:var(--c1)}
figcaption{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:6px;font-size:13px;color:var(--soft)}
.key::before{content:"";display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
.key.c0::before{background:var(--c0)}.key.c1::before{background:var(--c1)}.key.c2::before{background:var(--c2)}
.key.c3::before{background:var(--c3)}.key.c4::before{background:var(--c4)}.key.c5::before{background:var(--c5)}
.ask{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(500px,100%),1fr))}
.ask .card{display:grid;gap:10px;align-content:start}
.head{display:flex;gap:12px;align-items:center;justify-content:space-between}
.quote{font-weight:600}
.mark{font-size:12.5px;font-weight:600;white-space:nowrap}.mark.good{color:var(--good)}.mark.bad{color:var(--bad)}
.hits{display:flex;gap:8px;flex-wrap:wrap}
.hit{width:88px;font-size:12px;color:var(--soft);font-variant-numeric:tabular-nums}
.thumb{display:grid;place-items:center;width:88px;height:88px;border-radius:8px;overflow:hidden;border:2px solid var(--line);
background:var(--bg);font-size:11px;color:var(--soft);overflow-wrap:anywhere;text-align:center}
.thumb img{width:100%;height:100%;object-fit:cover;display:block}
.good>.thumb{border-color:var(--good)}
.pair{display:grid;grid-template-columns:88px 1fr;gap:14px;align-items:start}
ol.texts{margin:0;padding:0;list-style:none;display:grid;gap:4px;font-size:14px}
ol.texts li{display:flex;gap:10px;justify-content:space-between;border-left:3px solid var(--line);padding-left:10px}
ol.texts li.good{border-color:var(--good)}ol.texts span{color:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:minmax(130px,max-content) 1fr;gap:6px 18px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""
