"""The pictures of docs/kernels, who owns which tile and how data flows through a program, and those of docs/tour.md.

    python docs/kernels/draw.py

writes an SVG beside this script for each name in PICTURES and TOUR. The same script gives the same bytes; a test holds
the committed pictures to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent

# What a colour means in the picture of a kernel.
READ, OWNED, WRITTEN, MASKED, PLAIN = "#cfe2f3", "#f9cb9c", "#d9ead3", "url(#masked)", "#ffffff"
LEGEND = ((READ, "read"), (OWNED, "owned by one program"), (WRITTEN, "written"), (MASKED, "masked"))

LINE = 16  # height of a line of text, in pixels as everything here


class Picture:
    """Shapes on a white page of a size; (x, y) is the upper left corner of each."""

    def __init__(self, width: int, height: int, legend: Sequence[tuple[str, str]] = LEGEND) -> None:
        self.width, self.height = width, height
        self.shapes: list[str] = []
        x = 10
        for colour, meaning in legend:
            self.box(x, height - 24, 14, 14, colour)
            self.text(x + 20, height - 13, meaning)
            x += 40 + 7 * len(meaning)

    def box(self, x: float, y: float, width: float, height: float, colour: str, label: str = "") -> None:
        """A rectangle with centred lines of text."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}" stroke="#444"/>'
        )
        lines = label.splitlines()
        for i, line in enumerate(lines):
            below = y + height / 2 + 4 + LINE * (i - (len(lines) - 1) / 2)
            self.text(x + width / 2, below, line, anchor="middle")

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> None:
        """One line; `y` is its base line."""
        weight = ' font-weight="bold"' if bold else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="#444" marker-end="url(#head)"/>')

    def steps(self, x: float, y: float, width: float, steps: Sequence[tuple[str, str]]) -> list[float]:
        """Boxes below each other with arrows between, each a colour and lines of text; the middle height of each."""
        middles = []
        for i, (colour, label) in enumerate(steps):
            height = LINE * len(label.splitlines()) + 12
            self.box(x, y, width, height, colour, label)
            middles.append(y + height / 2)
            if i + 1 < len(steps):
                self.arrow((x + width / 2, y + height), (x + width / 2, y + height + 18))
            y += height + 20
        return middles

    def back(self, x: float, below: float, above: float, label: str) -> None:
        """A loop's way back, right of steps that end at `x`."""
        self.arrow((x, below), (x + 24, below), (x + 24, above), (x + 2, above))
        self.text(x + 30, (below + above) / 2, label)

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif" font-size="12">'
        )
        definitions = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker>'
            '<pattern id="masked" width="6" height="6" patternUnits="userSpaceOnUse">'
            '<rect width="6" height="6" fill="#fff"/><path d="M0,6 L6,0" stroke="#999"/></pattern></defs>'
        )
        page = f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>'
        return "\n".join([head, definitions, page, *self.shapes, "</svg>"]) + "\n"


def grid(picture: Picture, x: float, y: float, heights: Sequence[float], widths: Sequence[float], colours: str) -> None:
    """A plane cut into tiles; `colours` has a letter for each, row by row: r(ead), o(wned), w(ritten), m(asked), or
    a dot."""
    named = {"r": READ, "o": OWNED, "w": WRITTEN, "m": MASKED, ".": PLAIN}
    letters = iter(colours.replace(" ", ""))
    for i, height in enumerate(heights):
        for j, width in enumerate(widths):
            picture.box(x + sum(widths[:j]), y + sum(heights[:i]), width, height, named[next(letters)])


def packed(picture: Picture, x: float, y: float) -> None:
    """The packed tokens of three sequences, one of them at work."""
    picture.text(x, y - 8, "packed tokens", bold=True)
    for name, first, height in (("A", 0, 70), ("B", 70, 150), ("C", 220, 40)):
        for part, letter in enumerate("QKV"):
            picture.box(x + 26 * part, y + first, 26, height, READ if name == "B" else PLAIN, letter)
        picture.text(x + 84, y + first + height / 2 + 4, name)


def attention() -> str:
    """The forward."""
    picture = Picture(900, 400)
    packed(picture, 20, 60)
    left, top = 170, 60
    picture.text(left, top - 28, "scores of sequence B, one head", bold=True)
    picture.text(left, top - 8, "keys: BLOCK_N a step")
    grid(picture, left, top, [60, 60, 30], [50, 50, 50, 24], "...m ooom mmmm")
    picture.arrow((left + 8, top + 90), (left + 168, top + 90))
    picture.text(left, top + 172, "rows: BLOCK_M a program.")
    picture.text(left, top + 190, "Full blocks run without a mask,")
    picture.text(left, top + 206, "the last one of keys with it.")
    x = 430
    picture.text(x, 32, "one program", bold=True)
    middles = picture.steps(
        x,
        44,
        270,
        [
            (READ, "Q tile [BLOCK_M, D], once"),
            (READ, "K block, V block [BLOCK_N, D]\n(prefetched where there are stages)"),
            (OWNED, "S = Q Kᵀ, matrix unit, float32"),
            (OWNED, "m = max(m, rows of S)\nP = exp2(S·c − m), one fma and one exp2"),
            (OWNED, "l = l·r + sum P;  O = O·r + P V\nr = exp2(old m − m); P stays in registers"),
            (WRITTEN, "out = O / l;  lse = log of l, plus m"),
        ],
    )
    picture.back(x + 270, middles[4], middles[1], "next BLOCK_N keys")
    return picture.svg()


def attention_backward() -> str:
    """The three forms."""
    picture = Picture(880, 510)
    forms = (
        (
            "owns queries",
            [60, 60, 30],
            [50, 50, 50, 24],
            "...m ooom mmmm",
            ((8, 90), (168, 90)),
            ["Q, dO, O, lse", "K and V of each step", "dQ; (−lse, delta) for the other"],
        ),
        (
            "owns keys",
            [60, 60, 30],
            [50, 50, 50, 24],
            ".o.m .o.m mmmm",
            ((75, 8), (75, 144)),
            ["K, V", "Q, dO, (−lse, delta) of each step", "dK, dV"],
        ),
        (
            "one pass: all keys in one tile",
            [60, 60, 30],
            [150, 24],
            "om om mm",
            ((75, 8), (75, 144)),
            ["K, V", "Q, dO, O, lse of each step", "dQ of each step; dK, dV"],
        ),
    )
    for i, (title, heights, widths, colours, way, moved) in enumerate(forms):
        x, y = 20 + 285 * i, 50
        picture.text(x, y - 28, title, bold=True)
        picture.text(x, y - 8, "scores: rows are queries, columns keys")
        grid(picture, x, y, heights, widths, colours)
        picture.arrow(*((x + dx, y + dy) for dx, dy in way))
        products = [
            "delta = sum O·dO, once\nP = exp2(S·c − lse), S = Q Kᵀ\ndP = dO Vᵀ\ndS = P (dP − delta)\ndQ += dS K",
            "Pᵀ = exp2(Sᵀ·c − lse), Sᵀ = K Qᵀ\ndPᵀ = V dOᵀ;  dV += Pᵀ dO\ndSᵀ = Pᵀ (dPᵀ − delta)\ndK += dSᵀ Q",
            "as for keys, with\ndelta = sum O·dO\nand, of the same dS,\ndQ = dS K",
        ][i]
        middles = picture.steps(
            x, 225, 205, [(READ, f"once: {moved[0]}"), (READ, moved[1]), (OWNED, products), (WRITTEN, moved[2])]
        )
        picture.back(x + 205, middles[2], middles[1], "next")
    return picture.svg()


def rows_strided(picture: Picture, x: float, y: float, what: str) -> None:
    """A backward whose programs stride over the rows and leave their sums for a last pass."""
    picture.text(x, y - 8, "backward: programs stride over the rows", bold=True)
    for row in range(8):
        picture.box(x, y + 18 * row, 150, 18, OWNED if row % 3 == 1 else READ)
        picture.text(x + 158, y + 18 * row + 13, f"program {row % 3}")
    picture.box(x + 250, y, 130, 18, PLAIN, "sums of program 0")
    picture.box(x + 250, y + 18, 130, 18, OWNED, "sums of program 1")
    picture.box(x + 250, y + 36, 130, 18, PLAIN, "sums of program 2")
    picture.arrow((x + 226, y + 27), (x + 248, y + 27))
    picture.arrow((x + 315, y + 54), (x + 315, y + 82))
    picture.box(x + 250, y + 84, 130, 40, WRITTEN, what)
    picture.text(x, y + 166, "Sums are float32, in registers until the program ends. No atomics.")


def layer_norm() -> str:
    """Forward and backward."""
    picture = Picture(900, 400)
    picture.text(20, 32, "forward: one program, one warp up to 1024 columns", bold=True)
    picture.text(20, 52, "x, residual [rows, hidden]")
    for row in range(6):
        picture.box(20, 60 + 18 * row, 150, 18, OWNED if row == 2 else READ)
    picture.arrow((170, 105), (200, 105), (200, 75), (223, 75))
    picture.steps(
        225,
        60,
        215,
        [
            (READ, "x, x_bias, residual: once\n16 bytes a lane and access"),
            (OWNED, "z = residual + drop(x + x_bias)\nthe row stays in registers"),
            (OWNED, "mean = sum z / hidden\nvar = sum (z − mean)² / hidden"),
            (OWNED, "(z − mean)·rstd·weight + bias"),
            (WRITTEN, "out; for training z, mean, rstd"),
        ],
    )
    picture.text(20, 200, "Sums over a warp are")
    picture.text(20, 216, "shuffles: no shared memory,")
    picture.text(20, 232, "no barrier.")
    rows_strided(picture, 460, 60, "dweight, dbias,\ndx_bias")
    picture.text(460, 250, "One row: z as the forward stored it, normal = (z − mean)·rstd,")
    picture.text(460, 268, "dx = rstd·(g − mean g − n·mean(g·n)), g = dout·weight, n = normal.")
    return picture.svg()


def bias_gelu() -> str:
    """Forward and backward."""
    picture = Picture(900, 350)
    picture.text(20, 32, "forward: a tile of 4 rows a program", bold=True)
    picture.text(20, 52, "x [rows, width]; bias [width] above it")
    grid(picture, 20, 60, [12], [70, 70, 70], "ror")
    grid(picture, 20, 80, [36, 36, 36, 18], [70, 70, 70], "rrr ror rrr mmm")
    picture.text(20, 226, "A piece of the bias is loaded")
    picture.text(20, 242, "once for all rows of a tile.")
    picture.steps(
        250,
        60,
        190,
        [
            (READ, "x, bias: once"),
            (OWNED, "z = x + bias, float32"),
            (OWNED, "t = rsqrt(1 + k|z|)²\ntail = poly(t)·exp2(−z²·c)"),
            (OWNED, "max(z, 0) − |z|·tail"),
            (WRITTEN, "out, rounded once"),
        ],
    )
    rows_strided(picture, 460, 60, "dbias")
    picture.text(460, 250, "One tile: z again from x, its Phi and bell by the same exp2,")
    picture.text(460, 268, "dx = dout·(Phi(z) + z·phi(z)).")
    return picture.svg()


def embedding() -> str:
    """Forward, and the gradient of a table."""
    picture = Picture(900, 400)
    picture.text(20, 32, "forward: rows of three tables, gathered", bold=True)
    for i, (name, colours) in enumerate((("word", "..r...."), ("position", "r......"), ("token type", "r."))):
        picture.text(20 + 75 * i, 52, name)
        grid(picture, 20 + 75 * i, 60, [14] * len(colours), [60], colours)
        picture.arrow((50 + 75 * i, 60 + 14 * len(colours)), (50 + 75 * i, 178))
    picture.steps(
        20,
        180,
        210,
        [
            (OWNED, "z = word + position + type\na row stays in registers"),
            (OWNED, "LayerNorm, dropout"),
            (WRITTEN, "out [tokens, hidden]"),
        ],
    )
    x = 320
    picture.text(x, 32, "backward: a table's gradient without atomics", bold=True)
    picture.text(x, 52, "dtotal: a row a token")
    for row, entry in enumerate((7, 2, 7, 7, 9, 2)):
        picture.box(x, 60 + 20 * row, 110, 20, OWNED if entry == 7 else READ, f"id {entry}")
    picture.arrow((x + 112, 120), (x + 148, 120))
    picture.text(x + 150, 52, "ids sorted, stable")
    for row, entry in enumerate((2, 2, 7, 7, 7, 9)):
        picture.box(x + 150, 60 + 20 * row, 110, 20, OWNED if entry == 7 else READ, f"id {entry}")
    picture.arrow((x + 262, 120), (x + 298, 120))
    picture.text(x + 300, 52, "a program a run: a row")
    for row, entry in enumerate((2, 7, 9)):
        picture.box(x + 300, 80 + 30 * row, 110, 24, WRITTEN, f"row {entry}")
    picture.text(x, 210, "A program begins where a run of equal ids begins and adds its rows in order, from wherever")
    picture.text(x, 226, "they lie in dtotal. A run longer than a chunk is cut: each chunk's sum goes to a slot of")
    picture.text(x, 242, "its own, and a second kernel adds the slots in order. So equal inputs give equal bits.")
    picture.text(x, 274, "The kernel before it makes dtotal (LayerNorm's gradient) and strides over the tokens, with")
    picture.text(x, 290, "sums for weight and bias as in layer_norm.")
    return picture.svg()


def pooling() -> str:
    """Forward, without the norm and with it."""
    picture = Picture(900, 330)
    for x, title, owned in ((20, "a program: a sequence's line of columns", 1), (330, "of length 1: all columns", 4)):
        picture.text(x, 32, title, bold=True)
        picture.text(x, 52, "x [tokens, hidden]: sequences A, B, C")
        grid(picture, x, 60, [20] * 2, [60] * 4, "." * 8)
        grid(picture, x, 100, [20] * 3, [60 * owned] * (4 // owned), ("o" if owned == 4 else "rorr") * 3)
        grid(picture, x, 160, [20], [60] * 4, "." * 4)
        picture.arrow((x + 30 + 60 * (owned == 1), 104), (x + 30 + 60 * (owned == 1), 214))
        picture.box(x, 216, 240, 22, WRITTEN, "one float32 row for B")
    picture.steps(
        640,
        60,
        220,
        [
            (READ, "ROWS rows a step, once"),
            (OWNED, "sum, maximum or first row\nfloat32, a lane its own rows"),
            (OWNED, "over the lanes; / length; / norm"),
            (WRITTEN, "out [batch, hidden]"),
        ],
    )
    picture.text(20, 272, "Empty sequences give zeros. A maximum keeps NaN. Nothing is added by atomics.")
    return picture.svg()


def rotary() -> str:
    """What a program owns, and one pair of columns."""
    picture = Picture(900, 330)
    picture.text(20, 32, "qkv [tokens, 3, heads, head_dim]", bold=True)
    picture.text(20, 52, "a program: ROWS tokens of one head, and its query, key, value")
    for part, name in enumerate(("query", "key", "value")):
        picture.text(20 + 180 * part, 76, name)
        grid(picture, 20 + 180 * part, 84, [26] * 5, [40] * 4, (".o.." * 2 + "...." * 3))
    picture.text(20, 246, "The next program owns the next head of the same tokens, and finds their angles in a cache.")
    picture.text(20, 270, "Rows that are no tokens are copied. The backward turns the other way.")
    picture.steps(
        600,
        60,
        270,
        [
            (READ, "cos, sin [tokens, head_dim / 2], float32"),
            (READ, "two halves of a head, once"),
            (OWNED, "query, key: turned in float32\nvalue: as it is"),
            (WRITTEN, "out [tokens, 3, heads, head_dim]"),
        ],
    )
    return picture.svg()


def linear_gelu() -> str:
    """The order of tiles, and one tile."""
    picture = Picture(900, 360)
    picture.text(20, 32, "tiles of the result [rows, out]", bold=True)
    picture.text(20, 52, "GROUP_M rows of tiles at a time, down their columns")
    for row in range(6):
        for column in range(5):
            number = row // 3 * 15 + column * 3 + row % 3
            picture.box(20 + 54 * column, 60 + 36 * row, 54, 36, OWNED if number % 8 == 2 else PLAIN, str(number))
    picture.text(20, 298, "Programs, as many as run at once, stride over the tiles: here every eighth.")
    picture.steps(
        430,
        60,
        330,
        [
            (READ, "x [BLOCK_M, BLOCK_K], weight [BLOCK_N, BLOCK_K]\nof each step of the depth"),
            (OWNED, "acc += x weightᵀ, matrix unit, float32"),
            (WRITTEN, "for training: acc, without the bias"),
            (OWNED, "GELU(acc + bias)"),
            (WRITTEN, "out, rounded once"),
        ],
    )
    return picture.svg()


def packing() -> str:
    """The same batch padded and packed."""
    picture = Picture(700, 300, ((READ, "a token"), (MASKED, "padding")))
    texts = (("A", 8), ("B", 3), ("C", 5), ("D", 2))
    tokens, side = sum(length for _, length in texts), 26
    picture.text(20, 28, f"padded, [4, 8]: work for {4 * 8} places", bold=True)
    for row, (name, length) in enumerate(texts):
        for column in range(8):
            kept = column < length
            picture.box(20 + side * column, 40 + side * row, side, side, READ if kept else MASKED, name * kept)
    picture.text(20, 190, f"packed, [{tokens}]: work for {tokens} tokens", bold=True)
    first = 0
    for name, length in texts:
        for column in range(first, first + length):
            picture.box(20 + side * column, 202, side, side, READ, name)
        picture.arrow((20 + side * first, 246), (20 + side * first, 230))
        picture.text(20 + side * first, 260, str(first), anchor="middle")
        first += length
    picture.arrow((20 + side * tokens, 246), (20 + side * tokens, 230))
    picture.text(20 + side * tokens, 260, str(tokens), anchor="middle")
    picture.text(44 + side * tokens, 260, "packing.cu_seqlens")
    return picture.svg()


def layer() -> str:
    """What is launched for a batch in inference."""
    picture = Picture(560, 590, ((OWNED, "a kernel of ours"), (PLAIN, "a matrix product of torch")))
    steps = (
        (OWNED, "embedding\nthree rows added, LayerNorm", "[tokens, hidden]"),
        (PLAIN, "query, key, value", "[tokens, 3, heads, head_dim]"),
        (OWNED, "attention", "[tokens, hidden]"),
        (PLAIN, "output", "[tokens, hidden]"),
        (OWNED, "layer_norm\nbias, residual, LayerNorm", "[tokens, hidden]"),
        (PLAIN, "intermediate", "[tokens, 4 hidden]"),
        (OWNED, "bias_gelu", "[tokens, 4 hidden]"),
        (PLAIN, "output", "[tokens, hidden]"),
        (OWNED, "layer_norm\nbias, residual, LayerNorm", "[tokens, hidden]"),
        (OWNED, "pooling", "[sequences, hidden]"),
    )
    middles = picture.steps(20, 20, 210, [(colour, label) for colour, label, _ in steps])
    for middle, (_, _, made) in zip(middles, steps, strict=True):
        picture.text(330, middle + 4, made)
    picture.back(230, middles[8], middles[1], "next layer")
    return picture.svg()


TOUR: dict[str, Callable[[], str]] = {"packing": packing, "layer": layer}
PICTURES: dict[str, Callable[[], str]] = {
    "attention": attention,
    "attention_backward": attention_backward,
    "layer_norm": layer_norm,
    "bias_gelu": bias_gelu,
    "linear_gelu": linear_gelu,
    "embedding": embedding,
    "pooling": pooling,
    "rotary": rotary,
}


def main() -> None:
    """The command."""
    for name, draw in (PICTURES | TOUR).items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
