"""Write kernels/transforms.h: the one-dimensional Winograd transforms of every nested tile pair.

A tile F(m, r) computes m outputs of an r-tap correlation from n = m + r - 1 inputs by evaluating
at n points (infinity and n - 1 finite ones).  A family F(m, r) + F(m - 1, r) nests: the small tile
uses all points of the big one but the last, and the factor by which its weights would differ moves
into its input transform.  One set of transformed weights then serves both, so that 13 = 5 + 4 + 4
is covered exactly.  B^T and A^T are dyadic, hence exact in float32; only G rounds.

    python csrc/cpu/conv/generate_transforms.py            # writes the header
    python csrc/cpu/conv/generate_transforms.py --check    # fails if it is out of date
"""

import argparse
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

HEADER = Path(__file__).parent / "kernels" / "transforms.h"
HALF, QUARTER, THREE_QUARTERS = Fraction(1, 2), Fraction(1, 4), Fraction(3, 4)

# Finite points in their order of use: prefixes of SMALL stay within 1e-5 of float64, AGGRESSIVE
# spends accuracy on one more output per tile.
SMALL = [Fraction(0), Fraction(1), Fraction(-1), HALF, -HALF, Fraction(2), Fraction(-2)]
AGGRESSIVE = [
    *[Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2)],
    *[THREE_QUARTERS, -THREE_QUARTERS, QUARTER],
]

# (taps, outputs of the big tile, points)
FAMILIES = [
    (2, 4, SMALL),
    (2, 3, SMALL),
    (3, 6, SMALL),
    (3, 5, SMALL),
    (3, 4, SMALL),
    (3, 3, SMALL),
    (3, 7, AGGRESSIVE),
    (4, 4, SMALL),
    (4, 3, SMALL),
    (5, 4, SMALL),
    (5, 3, SMALL),
    (5, 5, AGGRESSIVE),
]

Matrix = list[list[Fraction]]


@dataclass
class Transform:
    """The matrices of one tile: weights n x r, inputs n x n, outputs m x n."""

    taps: int
    outputs: int
    points: list[Fraction]
    weights: Matrix
    inputs: Matrix
    outputs_matrix: Matrix
    scales: list[Fraction]

    @property
    def size(self) -> int:
        return self.outputs + self.taps - 1


def polynomial_with_roots(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the product of (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        for i, c in enumerate(coefficients):
            shifted[i] -= root * c
        coefficients = shifted
    return coefficients


def nearest_power_of_two(value: Fraction) -> Fraction:
    return Fraction(2) ** math.floor(math.log2(value) + 0.5)


def build(outputs: int, taps: int, family_points: list[Fraction]) -> Transform:
    """Toom-Cook matrices of F(outputs, taps) on a prefix of the family's points."""
    size = outputs + taps - 1
    points, extra = family_points[: size - 1], family_points[size - 1 :]
    weights: Matrix = [[Fraction(0)] * (taps - 1) + [Fraction(1)]]
    inputs: Matrix = [polynomial_with_roots(points)]
    scales = [Fraction(1)]
    for p in points:
        others = [q for q in family_points if q != p]
        row = [p**j / math.prod(p - q for q in others) for j in range(taps)]
        balance = 1 / nearest_power_of_two(max(abs(x) for x in row))
        weights.append([x * balance for x in row])
        scale = math.prod((p - q for q in extra), start=Fraction(1)) / balance
        scales.append(scale)
        remaining = polynomial_with_roots([q for q in points if q != p])
        inputs.append([x * scale for x in remaining] + [Fraction(0)])
    at_infinity = [Fraction(int(k == outputs - 1)) for k in range(outputs)]
    outputs_matrix = [[at_infinity[k], *(p**k for p in points)] for k in range(outputs)]
    result = Transform(taps, outputs, points, weights, inputs, outputs_matrix, scales)
    assert_exact(result)
    return result


def assert_exact(t: Transform) -> None:
    """A^T (G w . B^T d) is the correlation of d with w, for every pair of unit vectors."""
    for tap in range(t.taps):
        for position in range(t.size):
            product = [t.weights[i][tap] * t.inputs[i][position] for i in range(t.size)]
            for k, row in enumerate(t.outputs_matrix):
                value = sum(a * x for a, x in zip(row, product, strict=True))
                assert value == int(position == k + tap), (t.outputs, t.taps)


def combination(coefficients: list[Fraction], names: list[str]) -> str:
    """C++ for the sum of coefficient * name, terms that need no multiplication first."""
    terms = [(c, n) for c, n in zip(coefficients, names, strict=True) if c != 0]
    terms.sort(key=lambda term: (abs(term[0]) != 1, term[0] < 0))
    text = ""
    for coefficient, name in terms:
        sign = "-" if coefficient < 0 else "+"
        size = abs(coefficient)
        factor = name if size == 1 else f"{float(size)!r}f * {name}"
        if text:
            text += f" {sign} {factor}"
        else:
            text = (
                factor
                if sign == "+"
                else f"-{factor}"
                if size == 1
                else f"-{float(size)!r}f * {name}"
            )
    return text or "F32{}"


def names(array: str, count: int) -> list[str]:
    return [f"{array}[{i}]" for i in range(count)]


def paired(points: list[Fraction]) -> list[tuple[int, bool]]:
    """(index, whether the next point is its negative): a pair shares its even and odd parts."""
    groups, i = [], 0
    while i < len(points):
        pair = i + 1 < len(points) and points[i] != 0 and points[i + 1] == -points[i]
        groups.append((i, pair))
        i += 2 if pair else 1
    return groups


def even(powers: list[Fraction]) -> list[Fraction]:
    return [x if k % 2 == 0 else Fraction(0) for k, x in enumerate(powers)]


def odd(powers: list[Fraction]) -> list[Fraction]:
    return [x if k % 2 == 1 else Fraction(0) for k, x in enumerate(powers)]


def input_body(t: Transform) -> list[str]:
    data = names("d", t.size)
    lines = [f"v[0] = {combination(t.inputs[0], data)};"]
    for i, pair in paired(t.points):
        if not pair:
            lines.append(f"v[{i + 1}] = {combination(t.inputs[i + 1], data)};")
            continue
        p = t.points[i]
        shared = polynomial_with_roots([q for q in t.points if abs(q) != abs(p)])
        # (x + p) shared and (x - p) shared, through x shared (= a) and shared (= b).
        lines.append(f"const F32 a{i} = {combination([Fraction(0), *shared], data[:-1])};")
        lines.append(f"const F32 b{i} = {combination([*shared, Fraction(0)], data[:-1])};")
        for k, sign in ((i + 1, 1), (i + 2, -1)):
            scale = t.scales[k]
            terms = combination([scale, sign * scale * p], [f"a{i}", f"b{i}"])
            lines.append(f"v[{k}] = {terms};")
    return lines


def output_body(t: Transform) -> list[str]:
    terms, columns = ["m[0]"], [[row[0] for row in t.outputs_matrix]]
    lines = []
    for i, pair in paired(t.points):
        powers = [row[i + 1] for row in t.outputs_matrix]
        if pair:
            lines.append(f"const F32 s{i} = m[{i + 1}] + m[{i + 2}];")
            lines.append(f"const F32 t{i} = m[{i + 1}] - m[{i + 2}];")
            terms += [f"s{i}", f"t{i}"]
            columns += [even(powers), odd(powers)]
        else:
            terms.append(f"m[{i + 1}]")
            columns.append(powers)
    for k in range(t.outputs):
        lines.append(f"y[{k}] = {combination([column[k] for column in columns], terms)};")
    return lines


def gradient_body(t: Transform) -> list[str]:
    data = names("y", t.outputs)
    lines = [f"m[0] = y[{t.outputs - 1}];"]
    for i, pair in paired(t.points):
        powers = [row[i + 1] for row in t.outputs_matrix]
        if pair:
            lines.append(f"const F32 s{i} = {combination(even(powers), data)};")
            lines.append(f"const F32 t{i} = {combination(odd(powers), data)};")
            lines.append(f"m[{i + 1}] = s{i} + t{i};")
            lines.append(f"m[{i + 2}] = s{i} - t{i};")
        else:
            lines.append(f"m[{i + 1}] = {combination(powers, data)};")
    return lines


def weight_body(t: Transform) -> list[str]:
    taps = names("w", t.taps)
    return [f"u[{i}] = {combination(row, taps)};" for i, row in enumerate(t.weights)]


def weight_gradient_body(t: Transform) -> list[str]:
    data = names("u", t.size)
    columns = ([row[k] for row in t.weights] for k in range(t.taps))
    return [f"w[{k}] = {combination(column, data)};" for k, column in enumerate(columns)]


def method(name: str, source: str, target: str, comment: str, body: list[str]) -> list[str]:
    signature = f"FASTALEX_INLINE static void {name}(const F32* {source}, F32* {target}) {{"
    return [f"// {comment}", signature, *body, "}"]


def specialisation(outputs: int, taps: int, big: int, points: list[Fraction]) -> list[str]:
    t = build(outputs, taps, points)
    lines = [
        f"// F({outputs}, {taps}) at infinity, {', '.join(map(str, t.points))}",
        "template <>",
        f"struct Tile<{taps}, {big}, {outputs}> {{",
        f"static constexpr int kTaps = {taps}, kOutputs = {outputs}, kPoints = {t.size};",
        *method("input", "d", "v", "B^T: kPoints inputs to kPoints points", input_body(t)),
        *method("output", "m", "y", "A^T: kPoints products to kOutputs outputs", output_body(t)),
        *method("gradient", "y", "m", "A: the adjoint of output", gradient_body(t)),
    ]
    if outputs == big:
        lines += method("weights", "w", "u", "G: kTaps weights to kPoints points", weight_body(t))
        body = weight_gradient_body(t)
        lines += method("weight_gradient", "u", "w", "G^T: the adjoint of weights", body)
    return [*lines, "};", ""]


def generate() -> str:
    lines = [
        "// Generated by generate_transforms.py: Winograd transforms of nested tile pairs.",
        "#pragma once",
        '#include "../../vec.h"',
        '#include "inline.h"',
        "",
        "namespace fastalex::cpu::FASTALEX_ISA {",
        "",
        "// F(kOutputs, kTaps) of the family whose big tile has kBig outputs; kOutputs is kBig or"
        " kBig - 1.",
        "template <int kTaps, int kBig, int kOutputs>",
        "struct Tile;",
        "",
    ]
    for taps, big, points in FAMILIES:
        family = points[: big + taps - 2]
        lines += specialisation(big, taps, big, family)
        lines += specialisation(big - 1, taps, big, family)
    lines.append("}  // namespace fastalex::cpu::FASTALEX_ISA")
    return formatted("\n".join(lines) + "\n")


def formatted(source: str) -> str:
    """The text as clang-format leaves it, by the one beside this interpreter or on the path."""
    local = Path(sys.executable).parent / "clang-format"
    tool = str(local) if local.exists() else shutil.which("clang-format")
    if tool is None:
        raise SystemExit("clang-format is needed: pip install clang-format")
    command = [tool, f"--assume-filename={HEADER}"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare with the stored header")
    if parser.parse_args().check:
        sys.exit(0 if HEADER.read_text() == generate() else f"{HEADER} is out of date")
    HEADER.write_text(generate())


if __name__ == "__main__":
    main()
