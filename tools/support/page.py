"""Parts of a page of HTML that needs no other file."""

import base64
import math
from collections.abc import Iterable, Mapping
from html import escape
from operator import itemgetter
from pathlib import Path
from string import Template

import cv2
from matplotlib.ticker import MaxNLocator

Curve = Mapping[float, float]

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 0 1em;
 max-width: 1300px; color: #222; background: #fff }
h1, h2, h3, figcaption { overflow-wrap: anywhere }
h2 { border-bottom: 1px solid #ccc; margin-top: 1.8em }
div { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
td, th { border: 1px solid #ddd; padding: .25em .6em; text-align: left;
 vertical-align: top; overflow-wrap: anywhere; min-width: 6em }
th { background: #f4f4f4 }
pre { background: #f6f6f6; padding: .7em; overflow-x: auto; font-size: 12px }
figure { margin: 0 }
figcaption { font-size: 12px; color: #555 }
img { max-width: 100%; height: auto }
svg path { stroke: #ddd }
svg text { font-size: 12px; text-anchor: middle; fill: #444 }
svg .y { text-anchor: end; dominant-baseline: middle }
.dots { marker: url(#dot) }
$colours
polyline { fill: none !important; stroke-width: 1.5 }
.grid { display: grid; gap: 1em;
 grid-template-columns: repeat(auto-fill, minmax(min(20em, 100%), 1fr)) }
.x0, .x1, .x2 { display: none }
#x0:checked ~ .x0, #x1:checked ~ .x1, #x2:checked ~ .x2 { display: grid }
</style>
<svg width="0" height="0" style="position: absolute"><marker id="dot"
 viewBox="-4 -4 8 8" markerWidth="4" markerHeight="4"><circle r="4"
 fill="context-stroke" stroke="none"/></marker></svg>
<h1>$title</h1>
$body
</html>
""")
WIDEST = 1000  # pixels of an embedded picture
LONGEST = 300  # characters of a cell
MOST = 400  # times two: points of a curve
second = itemgetter(1)
Point = tuple[float, float]
COLOURS = (
    *('#1f77b4', '#d95f02', '#2ca02c', '#9467bd', '#d62728'),
    *('#8c564b', '#e377c2', '#7f7f7f', '#bcbd22', '#17becf'),
)


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page; the parts are HTML."""
    colours = '\n'.join(
        f'.c{n} {{ stroke: {c}; fill: {c}; color: {c} }}'
        for n, c in enumerate(COLOURS)
    )
    return PAGE.substitute(
        title=escape(title), body='\n'.join(parts), colours=colours
    )


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of texts, long ones cut."""
    lines = [''.join(f'<th>{escape(cell)}</th>' for cell in head)]
    for row in rows:
        texts = [str(cell) for cell in row]
        cut = [t[:LONGEST] + ' ...' * (len(t) > LONGEST) for t in texts]
        lines.append(''.join(f'<td>{escape(text)}</td>' for text in cut))
    body = '\n'.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div><table>\n{body}\n</table></div>'


def legend(names: Iterable[str]) -> str:
    """The colours of the runs."""
    return '\n'.join(
        f'<span class="c{number % 10}">&#9644; {escape(name)}</span>&emsp;'
        for number, name in enumerate(names)
    )


def grid(pictures: Iterable[str], kind: str = '') -> str:
    """Pictures side by side, as many as the screen is wide."""
    return f'<div class="grid {kind}">\n' + '\n'.join(pictures) + '</div>'


def picture(path: Path, words: str) -> str:
    """A picture of the disk, made smaller where it is large."""
    image = cv2.imread(str(path))
    if image is None:
        return f'<p>{escape(words)} cannot be read.</p>'
    height, width = image.shape[:2]
    if width > WIDEST:
        size = WIDEST, max(1, height * WIDEST // width)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    uri = 'data:image/jpeg;base64,' + base64.b64encode(jpeg).decode()
    text = escape(words)
    return (
        f'<figure><img src="{uri}" alt="{text}"><figcaption>{text}'
        '</figcaption></figure>'
    )


def panel(title: str, label: str, curves: Mapping[int, Curve]) -> str:
    """Draw one value of several runs; what is not finite is left out.

    Args:
        title: of the value.
        label: of the horizontal axis.
        curves: values by places, by the number of the run.
    """
    lines = {
        number: sorted((x, y) for x, y in curve.items() if math.isfinite(y))
        for number, curve in curves.items()
    }
    holes = sum(len(curve) - len(lines[n]) for n, curve in curves.items())
    words = escape(title) + (f' ({holes} NaN or infinite)' if holes else '')
    places = [point for points in lines.values() for point in points]
    if not places:
        return f'<p>{words}: no value to draw.</p>'
    xs, ys = zip(*places, strict=True)
    decades = min(ys) > 0 and max(ys) > 100 * min(ys)
    if decades:
        ys = [math.log10(y) for y in ys]
        lines = {
            n: [(x, math.log10(y)) for x, y in points]
            for n, points in lines.items()
        }
    columns = ticks_of(xs, isinstance(xs[0], int))
    rows = ticks_of(ys, decades)
    width, height = columns[-1] - columns[0], rows[-1] - rows[0]

    def at(x: float, y: float) -> tuple[str, str]:
        right, up = (x - columns[0]) / width, (y - rows[0]) / height
        return f'{60 + 340 * right:.1f}', f'{220 - 205 * up:.1f}'

    drawn = []
    for value in columns:
        x, _ = at(value, rows[0])
        drawn.append(f'<path d="M{x} 15V220"/>')
        drawn.append(f'<text x="{x}" y="238">{value:.6g}</text>')
    for value in rows:
        _, y = at(columns[0], value)
        words_of = f'{10**value if decades else value:g}'
        drawn.append(f'<path d="M60 {y}H400"/>')
        drawn.append(f'<text x="56" y="{y}" class="y">{words_of}</text>')
    for number, points in lines.items():
        spots = [','.join(at(*point)) for point in thinned(points)]
        dots = 'dots' if len(spots) < 30 else ''
        drawn.append(
            f'<polyline class="c{number % 10} {dots}" '
            f'points="{" ".join(spots)}"/>'
        )
    return (
        f'<figure><figcaption>{words}</figcaption>'
        f'<svg viewBox="0 0 420 262" role="img">{"".join(drawn)}'
        f'<text x="230" y="257">{label}</text></svg></figure>'
    )


def ticks_of(values: Iterable[float], integer: bool) -> list[float]:
    """Round numbers around some values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(low) or 1) / 10
    return MaxNLocator(5, integer=integer).tick_values(low, high).tolist()


def thinned(points: list[Point]) -> list[Point]:
    """Of many points, the lowest and the highest of each few."""
    size = math.ceil(len(points) / MOST) if len(points) > 2 * MOST else 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [(min(p, key=second), max(p, key=second)) for p in parts]
    return sorted({point for pair in ends for point in pair})
