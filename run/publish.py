"""A run made into a repository of the Hugging Face hub: weights that say what they are, and a model card."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError, brief
from core.files import clear_folder, write_atomic
from core.train.checkpoint import Checkpoint
from core.weights import files as weight_files
from core.weights import hub
from run.convert import Conversion
from run.sharing import about_run, folder_of, without_places
from run.weights import Source

CARD, PICTURES, CONFIG = "README.md", "samples.png", "config.yaml"
SENT = {CARD, PICTURES, CONFIG, "generator.safetensors", "tokenizer.safetensors"}


@dataclass
class Publication:
    """A run made into a repository of the hub; the options of scripts/publish.py."""

    run: str
    repository: str
    licence: str = "other"
    private: bool = False
    folder: Path | None = None  # where it is put together; None: in the run
    upload: bool = True

    def check(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise UserError(f'"{self.repository}" should read owner/name.')

    def publish(self) -> str:
        """Put it together and send it; returns a sentence about it."""
        self.check()
        source = Source(self.run)
        if not isinstance(source.content, Checkpoint):
            raise UserError(f"{self.run} is not a run of ours; name the folder of one.")
        kind, run_dir = source.content.state["primary"], folder_of(source.path)
        folder = self.folder or run_dir / "publish"
        clear_folder(folder, lambda made: {entry.name for entry in made.iterdir()} <= SENT)
        folder.mkdir(parents=True)
        Conversion(self.run, folder / f"{kind}.safetensors", keep="ema" if source.content.state["ema"] else "raw").run()
        if kind == "generator":
            self._add_tokenizer(source.content.state["config"]["tokenizer"], folder)
        if previews := sorted((run_dir / "samples").glob("step_*.png")):
            shutil.copy(previews[-1], folder / PICTURES)
        config = yaml.safe_load((run_dir / CONFIG).read_text())
        if kind == "generator":
            config["tokenizer"]["weights"] = self._address
        write_atomic(folder / CONFIG, yaml.safe_dump(without_places(config), sort_keys=False, allow_unicode=True))
        self._forget_places(folder)
        write_atomic(folder / CARD, self.card(kind, folder, run_dir))
        listed = ", ".join(sorted(p.name for p in folder.iterdir()))
        if not self.upload:
            return f"{folder} is ready to be sent: {listed}"
        return f"{self._send(folder)}: {listed}. Its address: hf://{self.repository}"

    def _add_tokenizer(self, section: dict[str, Any], folder: Path) -> None:
        """The tokenizer beside its generator, whose file then names its new place."""
        target, generator = folder / "tokenizer.safetensors", folder / "generator.safetensors"
        Conversion(section["weights"], target, keep="both", kind="tokenizer").run()
        content = weight_files.read(generator)
        assert content is not None
        content.about["tokenizer"] = {**content.about["tokenizer"], "weights": self._address}
        weight_files.save(generator, content, overwrite=True)

    @property
    def _address(self) -> str:
        """Of a generator's tokenizer."""
        return f"hf://{self.repository}/tokenizer.safetensors"

    def _forget_places(self, folder: Path) -> None:
        """Where things lie on this machine is taken out of the headers of the weights."""
        for path in folder.glob("*.safetensors"):
            content = weight_files.read(path)
            assert content is not None
            content.provenance = without_places(content.provenance)
            content.about |= without_places({k: v for k, v in content.about.items() if k != "class_names"})
            weight_files.save(path, content, overwrite=True)

    def card(self, kind: str, folder: Path, run_dir: Path) -> str:
        """README.md of the repository."""
        content = weight_files.read_header(folder / f"{kind}.safetensors")
        assert content is not None
        about, name = content.about, content.settings["name"]
        config = yaml.safe_load((folder / CONFIG).read_text())
        tags = ["tessera", name, "image-generation" if kind == "generator" else "image-tokenizer"]
        front = {"license": self.licence, "library_name": "tessera", "tags": tags}
        if kind == "generator":
            front["pipeline_tag"] = "unconditional-image-generation"
        names = about.get("class_names", [])
        lines = [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# {self.repository.split('/')[1]}",
            "",
        ]
        lines += [f"A {kind} of images, `{name}`, trained with Tessera.", ""]
        if (folder / PICTURES).is_file():
            lines += [f"![the last preview of the run]({PICTURES})", ""]
        lines += [
            "## Use",
            "",
            "In the folder of Tessera's code:",
            "",
            "```bash",
            *self._commands(kind, names),
            "```",
            "",
            "```python",
            "import run",
            "",
        ]
        lines += [f'model = run.load_{kind}("hf://{self.repository}")', "```", ""]
        load = f'torch.hub.load("path/to/tessera", "{kind}", "hf://{self.repository}", source="local")'
        lines += ["From any other folder:", "", "```python", "import torch", "", f"model = {load}", "```", ""]
        lines += ["## Training", "", "| | |", "|---|---|"]
        recipe = without_places(about_run(run_dir).get("recipe"))
        facts = {
            "recipe": f"{recipe}, with every setting in config.yaml" if recipe else "every setting is in config.yaml",
            "data": config["data"]["url"],
            "classes": f"{len(names)}: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "",
            "length": f"{config['train']['duration']}, {config['train']['global_batch']} pictures a step",
            "picture size": about.get("preprocessing", {}).get("image_size", ""),
            "weights": about["fingerprint"],
        }
        lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
        lines += ["", "## Results", "", *_results_table(about.get("results", []))]
        return "\n".join([*lines, "", "## Licence", "", f"Of the weights: {self.licence}.", ""])

    def _commands(self, kind: str, names: list[str]) -> list[str]:
        address = f"hf://{self.repository}"
        if kind == "tokenizer":
            return [f"python -m scripts.reconstruct --weights {address} cat.jpg --out panels"]
        label = f'"{names[0]}"' if names else "0"
        return [f"bash run_sample.sh {address} --labels {label} --out samples"]

    def _send(self, folder: Path) -> str:
        """The commit, after an upload."""
        if hub.is_offline():
            raise UserError(
                f"{folder} is ready, but the network is switched off (TESSERA_OFFLINE or HF_HUB_OFFLINE). Send it later: "
                f"hf upload {self.repository} {folder}"
            )
        from huggingface_hub import HfApi

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        try:
            api.create_repo(self.repository, private=self.private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message="Add weights and card"
            )
        except Exception as error:  # any of the library's, of its HTTP client's or of the network
            if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError"):  # of httpx or requests
                raise UserError(
                    f"the hub cannot be reached from here ({brief(error)}). {folder} is ready: on a machine with network, the "
                    f"same command sends it, or hf upload {self.repository} {folder}"
                ) from error
            raise UserError(
                f"{self.repository} does not take it ({brief(error)}). Log in with `hf auth login` or set "
                f"HF_TOKEN to a token that may write; {folder} is ready, the same command sends it again."
            ) from error
        return f"sent to {self.repository} as commit {commit.oid}"


def _cell(value: Any) -> str:
    """Text of a cell of a Markdown table; class names may hold anything."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _results_table(results: Sequence[dict[str, Any]]) -> list[str]:
    if not results:
        return ["Nothing was measured with run_eval_tokenizer.sh or run_eval_generator.sh before this was published."]
    lines = ["| metric | value | protocol | pictures | reference |", "|---|---|---|---|---|"]
    return lines + [
        f"| {r['metric']} | {r['value']:.5g} | {r.get('protocol', '')} | {r.get('count', '')} | {r.get('reference', '')} |"
        for r in results
    ]
