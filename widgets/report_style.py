"""The report's look: readable on a white page, on a black one and on paper, and nothing that is not in the file."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1e21;--soft:#5d636b;--line:#e3e5e8;--card:#f7f8f9;--code:#eef0f2;
--link:#1845fb;--ok:#1a7f4b;--watch:#a15c00;--alarm:#c0281f;--none:#5d636b;--accent:#3f63e0}
@media (prefers-color-scheme:dark){:root{--page:#131518;--ink:#e6e8ea;--soft:#9aa1a9;--line:#2c3036;--card:#1b1e22;
--code:#24282d;--link:#8fb0ff;--ok:#4cc38a;--watch:#f0a63a;--alarm:#ff7a70;--none:#9aa1a9;--accent:#7b9cff}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.6 system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,sans-serif}
main{max-width:1108px;margin:0 auto;padding:40px 24px 80px}
header h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em;overflow-wrap:anywhere}
header p{margin:0;color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:22px 0 0;padding:10px 0;border-block:1px solid var(--line);
font-size:13.5px}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
h2{font-size:21px;margin:52px 0 14px;letter-spacing:-.01em}
h3{font-size:15.5px;margin:26px 0 6px}
p,ul{max-width:80ch;margin:8px 0}ul{padding-left:20px}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
code{background:var(--code);border-radius:4px;padding:.1em .35em;overflow-wrap:anywhere;white-space:pre-wrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:12px 0}
pre code{background:none;padding:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;margin:26px 0 0}
.tile{border:1px solid var(--line);border-radius:10px;padding:12px 16px;background:var(--card)}
.tile b{display:block;font-size:25px;line-height:1.25;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tile span,.tile small{color:var(--soft);font-size:13px}
.ok{--own:var(--ok)}.watch{--own:var(--watch)}.alarm{--own:var(--alarm)}.none{--own:var(--none)}
.tile.ok b,.tile.watch b,.tile.alarm b{color:var(--own)}
.scroll{overflow-x:auto;margin:10px 0 4px}
table{border-collapse:collapse;font-size:13.5px;line-height:1.45;min-width:min(100%,420px)}
th{font-weight:600;text-align:left;color:var(--soft);font-size:12.5px;vertical-align:bottom}
th,td{padding:5px 18px 5px 0;border-bottom:1px solid var(--line)}
td{vertical-align:middle;max-width:56ch;overflow-wrap:break-word}
td code,th code{white-space:pre}td code.long{white-space:pre-wrap}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.state{color:var(--own);font-weight:600;white-space:nowrap}
.state::before{content:"";display:inline-block;width:8px;height:8px;border-radius:50%;background:var(--own);
margin-right:7px}
.moe-spark{display:block;fill:none;color:var(--accent)}
.moe-spark polyline{stroke:currentColor;stroke-width:1.4;stroke-linejoin:round}
.moe-spark circle{fill:currentColor}.moe-spark .moe-band{fill:var(--ok);opacity:.13}
.pictures{display:grid;grid-template-columns:1fr 1fr;gap:18px 20px;margin:18px 0}
figure{margin:0;min-width:0;overflow:auto hidden}figure.wide{grid-column:1/-1}
figure svg.main-svg,figure>img{display:block;width:100%;height:auto}
.entry{position:relative;margin:0;padding:0 0 18px 30px;border-left:2px solid var(--line);margin-left:6px}
.entry:last-of-type{padding-bottom:4px}
.entry::before{content:"";position:absolute;left:-7px;top:7px;width:12px;height:12px;border-radius:50%;
background:var(--own,var(--accent));border:2px solid var(--page)}
.entry.knob::before{border-radius:2px;transform:rotate(45deg)}
.entry:is(.note,.imported,.branch)::before{background:var(--soft)}.entry.checkpoint::before{border-radius:2px;background:var(--soft)}
.entry.wrong{--own:var(--alarm)}
.entry>h4{margin:0 0 2px;font-size:15px;font-weight:600;overflow-wrap:anywhere}
.entry>h4 span{color:var(--soft);font-weight:400;margin-right:8px;font-variant-numeric:tabular-nums}
.said{border-left:3px solid var(--line);padding:1px 0 1px 14px;margin:6px 0;max-width:80ch;overflow-wrap:anywhere}
.said :is(h1,h2,h3,h4,h5,h6){font-size:15px;margin:8px 0 4px}.said p{margin:4px 0}
footer{margin-top:56px;color:var(--soft);font-size:12.5px}
@media (max-width:1100px){.pictures{grid-template-columns:1fr}}
@media (max-width:760px){main{padding:24px 16px 60px}}
@media print{:root{--page:#fff;--ink:#000;--soft:#444;--line:#ccc;--card:#fff;--code:#f1f1f1;--link:#000;--ok:#12633a;
--watch:#834a00;--alarm:#a01f17;--none:#444;--accent:#2b49b8;color-scheme:light}
body{font-size:10.5pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}nav{display:none}
h2{margin-top:26px}h2,h3,h4{break-after:avoid}
figure,tr,.tile,pre{break-inside:avoid}.scroll{overflow:visible}td{overflow-wrap:anywhere}
.pictures{gap:10px 12px}table{font-size:8.5pt}th,td{padding:3px 9px 3px 0}
code,pre{font-size:8.5pt}td code,th code{white-space:pre-wrap;background:none;padding:0}
.moe-spark{width:110px;height:auto}.tiles{grid-template-columns:repeat(5,1fr);gap:8px}.tile{padding:8px 10px}
.tile b{font-size:16pt}
figure>div{min-width:0!important}
.modebar-container{display:none}}
"""
