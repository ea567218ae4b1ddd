"""run/playground: what a browser asks for and gets, over HTTP; files of the shown commands are those of the page."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shlex
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.rng import Draws
from core.weights import released
from data.sources import open_source
from generator.sampling import draw_latents
from run.playground import server, views
from scripts import edit, reconstruct, sample
from tests.conftest import finished_run, toy
from tests.tools.browser import CHROMIUM, Browser

PAIRS = {
    "rectok": ("rectok_tokenizer", "rectok_generator"),
    "fqgan": ("fqgan_tokenizer", "far"),
    "dar": ("dar_tokenizer", "dar_generator"),
    "imagefolder": ("imagefolder_tokenizer", "imagefolder_var"),
    "rear": ("vqgan_plus_tokenizer", "rear"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, _generator_run):
    """system -> the run folder of a toy generator."""
    made = {"rectok": _generator_run}
    for system, (tokenizer, generator) in list(PAIRS.items())[1:]:
        steps = 20 if system == "dar" else 2  # its decoder begins with nothing but noise
        weights = finished_run(tmp_path_factory, toy(tokenizer), f"train.duration={steps}step")
        made[system] = finished_run(
            tmp_path_factory, toy(generator), f"tokenizer.weights={weights}", "train.duration=2step"
        )
    return made


@pytest.fixture(scope="module")
def page(runs):
    """A playground of all toys, served from a thread."""
    torch.set_num_threads(1)
    opened = server.open_server(views.Models(list(map(str, runs.values()))), port=0)
    thread = threading.Thread(target=opened.serve_forever, daemon=True)
    thread.start()
    yield opened
    opened.shutdown()
    opened.server_close()
    thread.join()


def ask(page, path, request=None, headers=None, body=None):
    """(status, the lines of JSON that came back)."""
    connection = http.client.HTTPConnection(*page.server_address[:2], timeout=60)
    data = body if body is not None else None if request is None else json.dumps(request)
    kind = {} if data is None else {"Content-Type": "application/json"}
    connection.request("GET" if data is None else "POST", path, data, {**kind, **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, [json.loads(line) for line in text.splitlines()] if path != "/" else text


def model(page, system, kind):
    """The description of a model of a system."""
    ours = {"tokenizer": 0, "generator": 1}[kind]
    stem = f"toy_{PAIRS[system][ours]}"
    found = [m for m in ask(page, "/models")[1][0]["models"] if m["kind"] == kind and m["name"].endswith(stem)]
    assert len(found) == 1
    return found[0]


def picture(number=0, size=40):
    """(bytes of a PNG, as the page sends it)."""
    buffer = io.BytesIO()
    open_source("synthetic://?size=40&classes=4&count=8", "val")[number].image.resize((size, size + 9)).save(
        buffer, "PNG"
    )
    return buffer.getvalue(), {"name": f"my cat {number}.png", "data": base64.b64encode(buffer.getvalue()).decode()}


def content(url):
    assert url.startswith("data:image/png;base64,")
    return base64.b64decode(url.split(",")[1])


def test_controls_follow_from_what_a_tokenizer_is(page):
    found = {system: model(page, system, "tokenizer") for system in PAIRS}
    assert {s: (m["noise"], "kept" in m, len(m.get("branches", ()))) for s, m in found.items()} == {
        "rectok": (True, False, 0),
        "fqgan": (False, False, 2),
        "dar": (False, True, 1),
        "imagefolder": (False, True, 2),
        "rear": (False, False, 1),
    }
    assert found["dar"]["kept"]["count"] == 4 and found["imagefolder"]["kept"]["unit"] == "scale"
    assert found["fqgan"]["branches"] == ["vis", "sem"]
    scales = found["imagefolder"]["maps"]
    assert [m["count"] for m in scales] == [m["columns"] ** 2 for m in scales] and len(scales) > 2
    options = {system: set(model(page, system, "generator")["options"]) for system in PAIRS}
    draws = {"scale", "temperature", "top_k", "top_p"}
    assert options == {**dict.fromkeys(PAIRS, draws), "rectok": {"scale", "steps"}}


CHANGES = [
    ("rectok", {}),
    ("rectok", {"noise": 0.5}),
    ("fqgan", {"put": [[1, 3, 5], [0, 0, 2]]}),
    ("fqgan", {"branches": [1]}),
    ("dar", {"kept": 2, "put": [[0, 1, 7]]}),
    ("imagefolder", {"kept": 1}),
    ("rear", {}),
]


@pytest.mark.parametrize(("system", "changes"), CHANGES)
def test_the_command_of_a_picture_gives_its_bytes(page, tmp_path, monkeypatch, system, changes):
    request = {"model": model(page, system, "tokenizer")["number"], "picture": picture()[1], **changes}
    if "branches" in changes:
        request["donor"] = picture(1)[1]
    status, (answer,) = ask(page, "/tokenize", request)
    assert status == 200, answer
    for number in (0, 1):
        (tmp_path / f"my cat {number}.png").write_bytes(picture(number)[0])
    monkeypatch.chdir(tmp_path)
    words = shlex.split(answer["command"])
    assert words[:3] == ["python", "-m", "scripts.reconstruct"] and reconstruct.main(words[3:]) == 0
    assert (tmp_path / "panels" / answer["file"]).read_bytes() == content(answer["rebuilt"])
    (panel,) = (tmp_path / "panels").glob("000_*_psnr*.png")
    assert f"psnr{answer['psnr']:.2f}.png" in panel.name
    shown = [np.asarray(Image.open(io.BytesIO(content(answer[key])))) for key in ("original", "rebuilt", "error_map")]
    side = shown[0].shape[1]
    pixels = np.asarray(Image.open(panel))
    for i, part in enumerate(shown):
        assert np.array_equal(pixels[:, i * (side + 2) : i * (side + 2) + side], part)


@pytest.mark.parametrize(("system", "changes"), [case for case in CHANGES if case[1]])
def test_changes_change_the_picture_and_codes_alone(page, system, changes):
    request = {"model": model(page, system, "tokenizer")["number"], "picture": picture()[1], "donor": picture(1)[1]}
    (plain,), (changed,) = ask(page, "/tokenize", request)[1], ask(page, "/tokenize", {**request, **changes})[1]
    assert plain["rebuilt"] != changed["rebuilt"] and plain["original"] == changed["original"]
    if plain["codes"]:
        differing = {
            (b, p): code
            for b, row in enumerate(changed["codes"])
            for p, code in enumerate(row)
            if code != plain["codes"][b][p]
        }
        wanted = {(b, p): code for b, p, code in changes.get("put", ())}
        if "branches" not in changes:
            assert differing.items() <= wanted.items() and all(
                changed["codes"][b][p] == c for (b, p), c in wanted.items()
            )
        else:
            assert {b for b, _ in differing} == {1}


@pytest.mark.parametrize("system", list(PAIRS))
def test_the_command_of_samples_gives_their_bytes(page, tmp_path, system):
    found = model(page, system, "generator")
    options = {"scale": 2.5, **({"steps": 5} if "steps" in found["options"] else {"top_k": 3, "temperature": 0.9})}
    request = {"model": found["number"], "labels": f"{found['classes'][2]}, 0", "num": 3, "seed": 7, "options": options}
    status, lines = ask(page, "/generate", request)
    *looks, last = lines
    assert status == 200 and "done" in last, last
    words = shlex.split(last["command"])
    assert words[:2] == ["bash", "run_sample.sh"] and sample.main([*words[2:-1], str(tmp_path / "samples")]) == 0
    for i, drawn in enumerate(last["done"]):
        assert content(drawn["data"]) == (tmp_path / "samples" / drawn["file"]).read_bytes()
        assert looks[-1]["pictures"][i] == drawn["data"]
    assert [drawn["class"] for drawn in last["done"]] == [found["classes"][label] for label in (2, 0, 2)]
    assert len(looks) > 1
    if system != "rectok":  # whose toy paints the same whatever the latents
        assert looks[0] != looks[-1]


def mask(size, rows=0.5):
    """As the page sends it: the lower part white."""
    marked = np.zeros((size, size, 3), np.uint8)
    marked[round(size * (1 - rows)) :] = 255
    buffer = io.BytesIO()
    Image.fromarray(marked).save(buffer, "PNG")
    return {"name": "mask.png", "data": base64.b64encode(buffer.getvalue()).decode()}


@pytest.mark.parametrize("system", list(PAIRS))
def test_the_command_of_an_edit_gives_its_bytes(page, tmp_path, monkeypatch, system):
    found = model(page, system, "generator")
    data, photo = picture()
    request = {
        "model": found["number"],
        "picture": photo,
        "mask": mask(found["size"]),
        "labels": "1,0",
        "num": 3,
        "seed": 5,
    }
    status, (answer,) = ask(page, "/edit", {**request, "options": {"scale": 2.5}})
    assert status == 200, answer
    monkeypatch.chdir(tmp_path)
    (tmp_path / photo["name"]).write_bytes(data)
    (tmp_path / "mask.png").write_bytes(base64.b64decode(request["mask"]["data"]))
    words = shlex.split(answer["command"])
    assert words[:2] == ["bash", "run_edit.sh"] and edit.main(words[2:]) == 0
    for drawn in answer["done"]:
        assert content(drawn["data"]) == (tmp_path / drawn["file"]).read_bytes()
        assert " dB, border " in drawn["says"]
    assert [drawn["class"] for drawn in answer["done"]] == [found["classes"][label] for label in (1, 0, 1)]
    assert "are kept" in answer["remarks"][0]


@pytest.mark.parametrize("system", list(PAIRS))
def test_looks_lead_to_what_is_drawn_without_them(page, system):
    sampler = page.models.find(model(page, system, "generator")["number"], "generator").model.sampler
    labels, draws = torch.tensor([1, 2]), Draws(3, torch.arange(2))
    seen = []
    length = sampler.tokenizer.spec.length
    hook: dict[str, Any] = {"on_codes": lambda codes: seen.append((codes.clone(), codes.shape[1] / length))}
    if system == "rectok":
        hook = {"on_latents": lambda latents, share: seen.append((latents, share))}
    with torch.no_grad():
        drawn = draw_latents(sampler.generator, labels, draws, sampler.task.guidance, **hook)
        plain = draw_latents(sampler.generator, labels, draws, sampler.task.guidance)
    shares = [share for _, share in seen]
    assert torch.equal(drawn, plain) and torch.equal(seen[-1][0], plain)
    assert len(seen) > 2 and shares == sorted(set(shares)) and shares[-1] == 1
    if system != "rectok":
        assert all(torch.equal(codes, plain[:, : codes.shape[1]]) for codes, _ in seen)


def test_what_is_wrong_is_said_in_a_sentence_and_the_server_lives_on(page):
    number, data = model(page, "fqgan", "tokenizer")["number"], picture()[1]
    rectok, far = (model(page, *which)["number"] for which in (("rectok", "tokenizer"), ("fqgan", "generator")))

    def refused(path, request, said, **how):
        status, (answer,) = ask(page, path, request, **how)
        assert 400 <= status < 500 and said in answer["error"], answer

    whole = {"model": number, "picture": data}
    for text in ("junk", "\xff", "{", "[" * 100_000):
        refused("/tokenize", None, "not JSON", body=text.encode("latin-1"))
    refused("/tokenize", [1], "a JSON object")
    refused("/tokenize", {**whole, "model": far}, "no tokenizer with the number")
    refused("/tokenize", {**whole, "model": "../../etc"}, "no tokenizer with the number")
    refused("/tokenize", {"model": number}, "choose a picture")
    refused("/tokenize", {**whole, "picture": {"data": "?"}}, "did not arrive whole")
    for junk in (b"", b"<script>", b"\x89PNG\r\n\x1a\n", picture()[0][:-40]):
        bad = {"name": "x.png", "data": base64.b64encode(junk).decode()}
        refused("/tokenize", {**whole, "picture": bad}, "x.png")
    refused("/tokenize", {**whole, "put": [[0, 0, 99999]]}, "code 99999 does not exist")
    refused("/tokenize", {**whole, "put": [[0, 9999, 0]]}, "place 9999 does not exist")
    refused("/tokenize", {**whole, "put": [[0, 0, -1]]}, "code -1 does not exist")
    refused("/tokenize", {**whole, "put": [[0, 0, 1.5]]}, "three whole numbers")
    refused("/tokenize", {**whole, "put": 3}, "a list was expected")
    refused("/tokenize", {**whole, "branches": [4], "donor": data}, "branch 4 does not exist")
    refused("/tokenize", {**whole, "kept": 2}, "none can be left out")
    refused("/tokenize", {**whole, "noise": 0.5}, "no noise can be added")
    refused("/tokenize", None, "give a number", body=json.dumps({**whole, "model": rectok, "noise": float("nan")}))
    draw = {"model": far, "labels": "0", "num": 1}
    refused("/generate", {**draw, "labels": "tree frog"}, "tree frog")
    refused("/generate", {**draw, "labels": ""}, "name a class")
    refused("/generate", {**draw, "num": 10**9}, "num: give a whole number")
    refused("/generate", {**draw, "options": {"steps": 5}}, "it takes scale")
    refused("/generate", {**draw, "options": {"scale": "${oc.env:HOME}"}}, "scale: give a number")
    refused("/generate", {**draw, "options": {"scale": -1}}, "sample.scale")
    refused("/generate", {**draw, "options": {"top_k": [1, 2, 3]}}, "top_k")
    change = {**draw, "picture": data, "mask": mask(32)}
    refused("/edit", {**change, "picture": None}, "picture: choose a picture")
    refused("/edit", {**change, "mask": None}, "mask: choose a picture")
    refused("/edit", {**change, "mask": mask(32, rows=0)}, "the mask marks nothing")
    refused("/edit", {**change, "mask": mask(31)}, "the mask is 31 x 31")
    refused("/edit", {**change, "model": number}, "no generator with the number")
    refused("/elsewhere", {}, "nothing at")
    status, (answer,) = ask(page, "/tokenize", whole)
    assert status == 200 and answer["codes"]


def test_pictures_of_any_kind_are_taken(page):
    number = model(page, "fqgan", "tokenizer")["number"]
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP"), ("1", "TIFF"), ("I;16", "PNG")):
        buffer = io.BytesIO()
        image = Image.new(mode, (7, 31)) if mode == "I;16" else Image.new("RGB", (7, 31), "red").convert(mode)
        image.save(buffer, kind)
        sent = {"name": "odd", "data": base64.b64encode(buffer.getvalue()).decode()}
        status, (answer,) = ask(page, "/tokenize", {"model": number, "picture": sent})
        assert status == 200, (mode, kind, answer)


def test_what_other_sites_send_is_refused(page):
    number = model(page, "fqgan", "tokenizer")["number"]
    whole = {"model": number, "picture": picture()[1]}
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        assert ask(page, "/tokenize", whole, headers)[0] == 403
        assert ask(page, "/models", None, headers)[0] == 403
    assert ask(page, "/tokenize", whole, {"Content-Type": "text/plain"})[0] == 415
    assert ask(page, "/tokenize", None, {"Content-Length": str(1 << 40)}, body="{}")[0] == 413
    here = f"http://{page.server_address[0]}:{page.server_address[1]}"
    assert ask(page, "/tokenize", whole, {"Origin": here})[0] == 200
    status, html = ask(page, "/")
    assert status == 200 and "src=" not in html.split("<script>")[0] and "http" not in html.replace("http-equiv", "")


def test_other_machines_need_the_token(runs):
    with server.open_server(views.Models([str(runs["fqgan"])]), host="0.0.0.0", port=0) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        for path in ("/", "/models", "/models?token=wrong", "/models?token=%ff"):
            assert ask(opened, path if path != "/" else "/?")[0] == 403
        assert ask(opened, "/models", None, {"X-Token": opened.token})[0] == 200
        assert ask(opened, f"/models?token={opened.token}")[0] == 200 and opened.token in opened.address
        opened.shutdown()


def test_one_computation_at_a_time(page, monkeypatch):
    inside, most, gate = [], [], threading.Lock()
    draw = views.finite_uint8
    entry = page.models.find(model(page, "fqgan", "tokenizer")["number"], "tokenizer")
    decode = entry.model.module.decode

    def watched(*arguments):
        with gate:
            inside.append(1)
            most.append(len(inside))
        result = decode(*arguments)
        with gate:
            inside.pop()
        return result

    monkeypatch.setattr(entry.model.module, "decode", watched)
    request = {"model": page.models.entries.index(entry), "picture": picture()[1]}
    threads = [threading.Thread(target=ask, args=(page, "/tokenize", request)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and draw is views.finite_uint8


def test_which_models(runs, tmp_path, monkeypatch):
    junk = tmp_path / "other.safetensors"
    junk.write_bytes(os.urandom(64))
    models = views.Models([str(junk), str(runs["fqgan"])])
    kinds = [(entry.kind, bool(entry.error)) for entry in models.entries]
    assert kinds == [("", True), ("generator", False), ("tokenizer", False)]
    assert "other.safetensors" in models.describe()["models"][0]["error"]
    with pytest.raises(UserError, match="other.safetensors"):
        views.Models([str(junk)])
    monkeypatch.setattr(released, "TINY", tmp_path)
    with pytest.raises(UserError, match="bash run_quickstart.sh fqgan --smoke"):
        released.shipped()
    (tmp_path / "dar").mkdir()
    for kind in ("tokenizer", "generator"):
        (tmp_path / "dar" / f"{kind}.safetensors").touch()
    assert released.shipped() == [f"{tmp_path.name}/dar"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_in_a_browser_with_the_keyboard_alone(page, tmp_path, monkeypatch):
    evil = "<script>document.title='evil'</script>"
    far = page.models.find(model(page, "fqgan", "generator")["number"], "generator").model
    monkeypatch.setattr(far.sampler, "class_names", [evil, *far.sampler.class_names[1:]])
    number = model(page, "fqgan", "tokenizer")["number"]

    def choose(browser, which, value):
        browser.see(f"$('{which}').value = {value}, $('{which}').dispatchEvent(new Event('change')), 1")

    with Browser(tmp_path / "profile", width=400) as browser:
        browser.open(page.address)
        browser.wait("document.querySelectorAll('.examples button').length > 3")
        browser.press("Tab")
        assert browser.see("document.activeElement.id") == "tab-tokenize"
        choose(browser, "tokenizer", number)
        for _ in range(8):  # over the tokenizer and the file to the first example
            browser.press("Tab")
            if browser.see("document.activeElement.matches('#picture .examples button')"):
                break
        browser.press("Enter")
        browser.wait("!$('codes').hidden && document.querySelectorAll('.cell').length > 0")
        before = browser.see("$('rebuilt').src")
        browser.see("document.querySelector('.cell').focus(), 1")
        browser.press("ArrowRight", 3)
        assert browser.see("$('code-says').textContent").startswith("place 3: code ")
        alike = browser.see("document.querySelectorAll('.same').length")
        assert alike == browser.see("state.codes[0].filter(code => code === state.codes[0][3]).length") >= 1
        browser.press("Enter")
        assert browser.see("document.activeElement.id") == "code"
        browser.see("document.activeElement.select(), 1")
        browser.type("99999")
        browser.press("Enter")
        browser.wait("$('tokenize-message').textContent.includes('code 99999 does not exist')")
        browser.press("Enter")  # back on the cell
        browser.see("document.activeElement.select(), 1")
        browser.type(str(browser.see("(state.codes[0][3] + 1) % tokenizer().vocab")))
        browser.press("Enter")
        browser.wait(f"$('rebuilt').src !== {json.dumps(before)}")
        assert browser.see("document.querySelectorAll('.put').length") == 1
        assert "--put 0:3=" in browser.see("document.querySelector('#tokenize-command pre').textContent")
        assert browser.see("document.documentElement.scrollWidth") <= 400

        browser.see("$('tab-tokenize').focus(), 1")
        browser.press("ArrowRight")
        choose(browser, "generator", model(page, "fqgan", "generator")["number"])
        choose(browser, "second", model(page, "dar", "generator")["number"])
        browser.see("$('labels').value = '0', $('labels').focus(), 1")
        browser.press("Enter")
        browser.wait("document.querySelectorAll('#results .command').length === 2")
        captions = browser.see("[...document.querySelectorAll('#results figcaption')].map(c => c.textContent)")
        assert captions == [evil] * 8 + [model(page, "dar", "generator")["classes"][0]] * 8
        browser.see("$('tab-generate').focus(), 1")
        browser.press("ArrowRight")
        choose(browser, "editor-model", model(page, "fqgan", "generator")["number"])
        assert browser.see("$('paint').hidden && $('change').disabled")
        browser.see("document.querySelector('#photo .examples button').focus(), 1")
        browser.press("Enter")
        browser.wait("state.image !== null")
        browser.see("$('rectangle').focus(), 1")
        browser.press("Enter")
        assert browser.see("$('marked').textContent") == "50 % of the picture is marked"
        browser.see("$('edit-num').value = 2, $('edit-labels').value = '0', $('edit-labels').focus(), 1")
        browser.press("Enter")
        browser.wait("!$('edited').hidden")
        assert browser.see("[...document.querySelectorAll('#edited figcaption')].map(c => c.textContent)") == [evil] * 2
        assert "--mask mask.png" in browser.see("document.querySelector('#edit-command pre').textContent")
        browser.see("$('clear').click(), $('change').click(), 1")
        browser.wait("$('edit-message').textContent.includes('the mask marks nothing')")
        assert browser.see("document.title") == "Playground"
        assert browser.see("document.documentElement.scrollWidth") <= 400
        divs = "[...document.querySelectorAll('*')].filter(e => e.onclick && !/BUTTON|INPUT|A/.test(e.tagName)).length"
        assert browser.see(divs) == 0
        unnamed = "[...document.querySelectorAll('input,select')].filter(e => !e.labels?.length && !e.ariaLabel).length"
        assert browser.see(unnamed) == 0
        assert [c for c in browser.complaints if "400 (Bad Request)" not in c] == []
