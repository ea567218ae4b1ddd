"""The report is one valid, self-contained page whatever is put in; metrics.json is readable whatever the values are."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from evaluation.protocols import meaning_of
from evaluation.report import Report, environment, format_number, line_chart, log_ticks, ticks, write_metrics

HOSTILE = "<script>alert(1)</script> & \"cats'"
VOID = {"meta", "img", "path", "circle"}


class Checker(HTMLParser):
    """Every opened tag is closed in order; remembers the tags, the attributes and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_report_is_self_contained_and_escaped(tmp_path):
    picture = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    curve = [(0, 1.0), (1, math.nan), (2, 0.5), (3, math.inf), (4, 0.2)]
    report = Report(HOSTILE, HOSTILE)
    report.add_tile(HOSTILE, 0.71234, HOSTILE, HOSTILE).add_text(HOSTILE, f"one\n\n{HOSTILE}")
    report.add_curves(HOSTILE, {HOSTILE: curve, "empty": []}, log=True, xlabel=HOSTILE).add_curves("none", {})
    report.add_image(HOSTILE, picture, HOSTILE).add_image("pil", Image.new("L", (500, 20)))
    report.add_grid_with_neighbours("grid", [(HOSTILE, [(picture, picture, 0.5, True), (picture, picture, 0.1, None)])])
    report.add_table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, 1], ["b", None]]).add_table("no rows", ["a"], [])
    report.add_config(HOSTILE).add_environment({HOSTILE: HOSTILE})
    report.write(tmp_path / "deep" / "report.html")
    html = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.html"]  # no temporary file stays
    checker = check(html)
    assert not {"script", "link", "iframe"} & set(checker.tags)
    sources = [value for name, value in checker.attributes if name in ("src", "href")]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    assert not re.search(r"https?:|url\(|@import", html)
    assert checker.text.count(HOSTILE) >= 8
    text = "".join(checker.text)
    assert "0.7123" in text
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html)).replace("not finite", "")


def test_small_pictures_are_enlarged():
    def widths(image: Image.Image, **options) -> list[str]:
        return re.findall(r'<img[^>]* width="(\d+)"', Report("t").add_image("p", image, **options).html())

    assert widths(Image.new("L", (500, 20))) == ["500"] and widths(Image.new("L", (100, 20))) == ["300"]
    assert widths(Image.new("L", (500, 20)), enlarged=2) == ["1000"]


def test_neighbouring_curves_share_one_grid():
    html = Report("t").add_curves("a", {"x": [(0, 1)]}).add_curves("b", {"x": [(0, 1)]}).add_text("t", "x")
    html = html.add_curves("c", {"x": [(0, 1)]}).html()
    assert html.count('<div class="charts">') == 2
    check(html)


def path_of(svg: str) -> str:
    return re.search(r'class="line s0" d="([^"]*)"', svg)[1]


def test_curves_leave_gaps_and_survive_anything():
    svg = line_chart("loss", {"a": [(0, 1), (1, 2), (2, math.nan), (3, 1), (4, 2)]})
    assert path_of(svg).count("M") == 2 and path_of(svg).count("L") == 2
    assert path_of(line_chart("loss", {"a": [(0, 1), (1, -2), (2, 0.1)]}, log=True)).count("M") == 2
    for empty in ({}, {"a": []}, {"a": [(0, math.nan)]}):
        assert "no values" in line_chart("loss", empty)
    for points in ([(3, 5.0)], [(0, 0.0), (1, 0.0)], [(0, 7.0), (1, 7.0)], [(0, 1e-9), (1, 1e9)]):
        for log in (False, True):
            assert "nan" not in line_chart("loss", {"a": points}, log=log)


def test_the_legend_names_the_last_value_of_what_goes_on():
    """Of measurements with intervals, one beside the other, the last one is not the result."""
    points = [(1.0, 7.0), (2.0, 3.0), (3.0, 9.0)]
    bars = {"fid": [(x, y - 1, y + 1) for x, y in points]}
    assert "<b>9</b>" in Report("r").add_curves("loss", {"fid": points}).html()
    assert "<b>" not in Report("r").add_curves("scale", {"fid": points}, bars=bars).html()
    assert "<b>7</b>" in Report("r").add_curves("rate", {"fid": points[:1]}, bars=bars).html()


def test_cells_with_sentences_are_broken_into_lines():
    rows = [("psnr", 21.5, "16 pictures in 112 dimensions: far too few"), ("ssim", 0.5, "")]
    html = Report("r").add_table("numbers", ("metric", "value", "note"), rows).html()
    assert '<td>psnr</td><td class="number">21.5</td><td class="prose">16 pictures' in html


def test_long_curves_are_thinned_but_keep_spikes():
    points = [(i, 1.0 + 0.001 * (i % 7)) for i in range(20_000)]
    points[12_345] = (12_345, 50.0)
    svg = line_chart("loss", {"a": points})
    assert len(svg) < 12_000
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path_of(svg))]
    assert min(heights) < 30 < 200 < max(heights)


def test_ticks_and_numbers():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(0.15, 1.2) == pytest.approx([0.2, 0.5, 1])
    assert log_ticks(1.5, 7.0) == [2, 4, 6]
    values = (0, 12_500, 3e-7, 0.25, 1e6, -2.5)
    assert [format_number(value) for value in values] == ["0", "12.5k", "3e-7", "0.25", "1M", "-2.5"]


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.json"
    metrics = {"fd_lite0_block4": 12.5, "psnr": math.nan, "accuracy_by_class": {"a": math.inf}, "warning": "few"}
    write_metrics(path, metrics, {"count": 10, "net": "lite0", "note": "x"})
    record = json.loads(path.read_text())
    assert record["metrics"]["fd_lite0_block4"]["value"] == 12.5
    assert "Not FID" in record["metrics"]["fd_lite0_block4"]["sentence"]
    assert record["metrics"]["psnr"]["value"] is None and record["metrics"]["psnr"]["unit"] == "dB"
    assert record["metrics"]["accuracy_by_class"]["value"] == {"a": None}
    assert record["context"] == {"count": 10, "net": "lite0", "reference_fingerprint": None, "seed": None, "note": "x"}
    assert record["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_meanings():
    assert meaning_of("real_fd_lite0_block4").title == "Frechet lite0_block4, real"
    assert meaning_of("rfd_lite0_block4").better == "lower"
    assert meaning_of("something_else").title == "something else"


def test_environment_says_what_ran():
    found = environment()
    assert {"python", "torch", "platform", "cpu", "torch threads", "gpu"} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())
