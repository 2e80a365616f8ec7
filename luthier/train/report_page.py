"""The page of report.html as a Jinja template; what it is filled with is `report.py`.

One file without scripts or anything from outside, so that it can be mailed. Every value passes through
autoescape. Light and dark follow the reader's system.
"""

PAGE = """\
{%- macro drawing(chart) -%}
<figure>
<figcaption><b>{{ chart.title }}</b>
{%- for style, name in chart.legend if chart.legend|length > 1 %}<span class="key {{ style }}"><i></i>{{ name }}</span>{% endfor -%}
</figcaption>
<svg viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="img" aria-label="{{ chart.title }}">
<g class="grid">
{%- for y, text in chart.y_ticks %}<path d="M{{ chart.left }},{{ y }}H{{ chart.right }}"/>{% endfor %}
</g>
<g class="ticks">
{%- for y, text in chart.y_ticks %}<text x="{{ chart.left - 8 }}" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>{% endfor %}
{%- for x, text in chart.x_ticks %}<path d="M{{ x }},{{ chart.bottom }}v4"/><text x="{{ x }}" y="{{ chart.bottom + 17 }}" text-anchor="middle">{{ text }}</text>{% endfor %}
<text x="{{ (chart.left + chart.right) / 2 }}" y="{{ chart.height - 4 }}" text-anchor="middle">step</text>
<text transform="translate(13 {{ (chart.top + chart.bottom) / 2 }}) rotate(-90)" text-anchor="middle">{{ chart.y_label }}</text>
</g>
<path class="axis" d="M{{ chart.left }},{{ chart.bottom }}H{{ chart.right }}"/>
{%- for style, path in chart.lines %}<path class="line {{ style }}" d="{{ path }}"/>{% endfor %}
{%- for style, x, y, text in chart.dots %}<circle class="dot {{ style }}" cx="{{ x }}" cy="{{ y }}" r="4"><title>{{ text }}</title></circle>{% endfor %}
</svg>
</figure>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} - Luthier</title>
<style>
:root { --paper: #f6f5f2; --card: #fff; --ink: #1d1c1a; --soft: #6a6760; --rule: #e4e1da; --accent: #9a4f1a;
  --accent-soft: #d9a781; --second: #2a6f97; --good: #2c7a3f; --bad: #b3261e; --good-paper: #e6f3e8; --bad-paper: #fbe9e7; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --card: #211f1c; --ink: #ece8e1; --soft: #a39d92;
  --rule: #37342f; --accent: #e8a36b; --accent-soft: #7d5a3f; --second: #7fbfe3; --good: #7fcf92; --bad: #ff8f86;
  --good-paper: #1f3325; --bad-paper: #42211e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 48px; }
header { margin-bottom: 22px; }
.brand { color: var(--accent); font-weight: 600; letter-spacing: .08em; text-transform: uppercase; font-size: 12px; }
h1 { font-size: 26px; line-height: 1.25; margin: 2px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 30px 0 10px; }
.soft, footer { color: var(--soft); }
.headline { font-size: 17px; margin: 12px 0 0; max-width: 46em; }
.card, .tile, figure, .table { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.tile { padding: 12px 14px; min-width: 0; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; line-height: 1.3; }
.tile .note { color: var(--soft); font-size: 13px; }
figure { margin: 0 0 12px; padding: 14px 16px 8px; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; margin-bottom: 6px; }
.key { color: var(--soft); font-size: 13px; white-space: nowrap; }
.key i { display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle; background: currentColor; }
.key.raw i { background: var(--accent-soft); } .key.smooth i, .key.rate i { background: var(--accent); }
.key.evaluated i { background: var(--second); width: 9px; height: 9px; border-radius: 50%; }
svg { display: block; width: 100%; height: auto; }
.grid path { stroke: var(--rule); } .axis, .ticks path { stroke: var(--soft); fill: none; }
.ticks text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: var(--accent); }
.line.raw { stroke: var(--accent-soft); stroke-width: 1; } .line.evaluated { stroke: var(--second); stroke-dasharray: 4 4; stroke-width: 1.5; }
.dot { fill: var(--accent); stroke: var(--card); stroke-width: 1.5; } .dot.evaluated { fill: var(--second); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 7px 14px; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody th { font-weight: 500; }
.facts th { width: 13em; color: var(--soft); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.sample { margin-bottom: 12px; padding: 14px 16px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px 20px; }
.answers h3 { margin: 0 0 3px; font-size: 12px; font-weight: 600; color: var(--soft); text-transform: uppercase; letter-spacing: .05em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16em; overflow-y: auto; margin: 0; }
.question { font-weight: 600; margin: 0 0 10px; }
ul { list-style: none; margin: 0; padding: 10px 16px; }
li { padding: 4px 0; overflow-wrap: anywhere; }
.mark { display: inline-block; min-width: 5.4em; text-align: center; margin-right: 10px; padding: 0 8px; border-radius: 99px; font-size: 12px; font-weight: 600; }
.mark.good { background: var(--good-paper); } .mark.bad { background: var(--bad-paper); }
footer { margin-top: 34px; font-size: 13px; }
@media (max-width: 620px) { .ticks text { font-size: 19px; } .line { stroke-width: 3; } .dot { r: 7px; } th, td { padding: 7px 10px; } .facts th { width: 9em; } }
@media print { body { background: none; } .text { max-height: none; } figure, .sample, .tile, tr { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header>
<div class="brand">Luthier run report</div>
<h1>{{ title }}</h1>
{%- if subtitle %}<div class="soft">{{ subtitle }}</div>{% endif %}
{%- if headline %}<p class="headline">{{ headline }}</p>{% endif %}
</header>
{%- if tiles %}
<div class="tiles">
{%- for name, value, note in tiles %}
<div class="tile"><div class="name">{{ name }}</div><div class="value">{{ value }}</div>{% if note %}<div class="note">{{ note }}</div>{% endif %}</div>
{%- endfor %}
</div>
{%- endif %}
{%- if charts %}
<h2>Training</h2>
{% for chart in charts %}{{ drawing(chart) }}{% endfor %}
{%- endif %}
{%- if metrics %}
<h2>Evaluation</h2>
<div class="table"><table>
<thead><tr><th>Measure</th>{% for name in metrics.columns %}<th class="number">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for name, cells, change, verdict in metrics.rows %}
<tr><th>{{ name }}</th>{% for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}
{%- if metrics.changes %}<td class="number {{ verdict }}">{{ change }}</td>{% endif %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endif %}
{%- if samples %}
<h2>Sample answers</h2>
{%- for sample in samples %}
<div class="card sample"><p class="question text">{{ sample.prompt }}</p><div class="answers">
{%- for name, text in sample.answers %}
<div><h3>{{ name }}</h3><p class="text">{{ text }}</p></div>
{%- endfor %}
</div></div>
{%- endfor %}
{%- endif %}
{%- if remarks %}
<h2>Remarks</h2>
<div class="card"><ul>{% for text in remarks %}<li>{{ text }}</li>{% endfor %}</ul></div>
{%- endif %}
{%- if checks %}
<h2>Checks</h2>
<div class="card"><ul>
{%- for name, passed, detail in checks %}
<li><span class="mark {{ 'good' if passed else 'bad' }}">{{ 'passed' if passed else 'failed' }}</span>{{ name }}{% if detail %} <span class="soft">{{ detail }}</span>{% endif %}</li>
{%- endfor %}
</ul></div>
{%- endif %}
{%- if run %}
<h2>Run</h2>
<div class="table"><table class="facts"><tbody>
{%- for name, value in run %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}
</tbody></table></div>
{%- endif %}
{%- if ledger %}
<h2>Data</h2>
<div class="table"><table>
<thead><tr><th></th>{% for name in ledger.columns %}<th class="number">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for name, cells in ledger.rows %}
<tr><th>{{ name }}</th>{% for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- if ledger.reasons %}<ul class="soft">{% for text in ledger.reasons %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
{%- endif %}
<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""
