"""A stand-in for the Hugging Face Hub: repositories of the real ids, tiny and random, over HTTP.

    python tools/hub_stand_in.py out/hub   # makes what is missing there, and serves it until Ctrl-C
    HF_ENDPOINT=http://127.0.0.1:8000 HF_HOME=out/home python …   # in another shell, asks it

Each repository that the paper preset names is here with the files, columns and classes of the real one, so
that the code that reads it is the code that reads the real one. What it holds means nothing.
"""
import argparse
import hashlib
import json
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dmin.core.runtime import quiet_libraries
from dmin.families.ddpm import seeded, tiny_ddpm
from dmin.families.latent import tiny_t5, tiny_text_encoder, tiny_vae, train_tokenizer
from dmin.lora import add_lora
from dmin.reproduction.image_sets import IMAGE_SETS
from dmin.reproduction.mixture import SUBSETS
from dmin.reproduction.presets import PRESETS

SD14, SD3 = "CompVis/stable-diffusion-v1-4", "stabilityai/stable-diffusion-3-medium-diffusers"
SD3_LORA, CIFAR10_DDPM = "huaweilin/DMin_sd3_medium_lora_r4", "google/ddpm-cifar10-32"
CLIP = PRESETS["paper"]["clip"]


# models, saved as the real ones are

def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def write_index(folder: Path, pipeline: str, parts: dict[str, tuple[str, str]]) -> None:
    """model_index.json; `parts` are name -> (library, class)."""
    about = {"_class_name": pipeline, "_diffusers_version": "0.29.0"}
    write_json(folder / "model_index.json", about | {name: list(part) for name, part in parts.items()})


def write_clip_tokenizer(tokenizer, folder: Path, pad: str = "<|endoftext|>") -> None:
    """In the files of old repositories, which have no tokenizer.json."""
    folder.mkdir(parents=True)
    tokenizer.backend_tokenizer.model.save(str(folder))   # vocab.json, merges.txt
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    write_json(folder / "special_tokens_map.json", special)
    usual = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", special | usual)


def write_old_weights(folder: Path) -> None:
    """Pickles beside the safetensors, as old repositories have them: empty, as nobody may read them."""
    for path in folder.rglob("*.safetensors"):
        path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin").touch()


def clip_tokenizer(): return train_tokenizer([], length=77)


def image_processor(size: int):
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def clip_config(tokenizer):
    from transformers import CLIPConfig

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = small | ends | dict(vocab_size=len(tokenizer), max_position_embeddings=77)
    vision = small | dict(image_size=32, patch_size=16)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)


def stable_diffusion(folder: Path) -> None:
    """SD 1.4: four levels, epsilon, PNDM, a safety checker."""
    from diffusers import PNDMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    tokenizer, vae = clip_tokenizer(), tiny_vae(512, channels=(16, 32, 32, 32))
    vae.register_to_config(shift_factor=None, scaling_factor=.18215)
    config = dict(sample_size=64, cross_attention_dim=32, block_out_channels=(16, 32, 32, 32))
    unet = seeded(0, lambda: UNet2DConditionModel(**config, layers_per_block=1, norm_num_groups=8))
    betas = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    parts = {
        "vae": vae,
        "unet": unet,
        "text_encoder": tiny_text_encoder(tokenizer, width=32),
        "safety_checker": seeded(0, lambda: StableDiffusionSafetyChecker(clip_config(tokenizer))),
        "scheduler": PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1),
        "feature_extractor": image_processor(32)}
    for name, part in parts.items(): part.save_pretrained(folder / name)
    write_clip_tokenizer(tokenizer, folder / "tokenizer")
    write_old_weights(folder)
    write_index(folder, "StableDiffusionPipeline", {
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
        "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
        "scheduler": ("diffusers", "PNDMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL")})


def sd3_transformer():
    from diffusers import SD3Transformer2DModel

    return seeded(0, lambda: SD3Transformer2DModel(
        sample_size=128, num_layers=3, num_attention_heads=2, attention_head_dim=32, pos_embed_max_size=96,
        caption_projection_dim=64, joint_attention_dim=96, pooled_projection_dim=64))


def stable_diffusion_3(folder: Path) -> None:
    """SD 3 Medium with T5, in half precision and with T5 in several files."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    tokenizer, t5 = clip_tokenizer(), train_tokenizer([], kind="T5Tokenizer", length=512)
    vae = tiny_vae(1024, channels=(16, 32, 32, 32), latent_channels=16)
    vae.register_to_config(shift_factor=.0609, scaling_factor=1.5305)
    parts = {
        "vae": vae,
        "transformer": sd3_transformer(),
        "text_encoder": tiny_text_encoder(tokenizer, width=32, pooled=True),
        "text_encoder_2": tiny_text_encoder(tokenizer, width=32, pooled=True, seed=1),
        "text_encoder_3": tiny_t5(t5, width=96)}
    for name, part in parts.items():
        several = {"max_shard_size": "100KB"} if name == "text_encoder_3" else {}
        part.to(torch.float16).save_pretrained(folder / name, **several)
    FlowMatchEulerDiscreteScheduler(shift=3.).save_pretrained(folder / "scheduler")
    write_clip_tokenizer(tokenizer, folder / "tokenizer")
    write_clip_tokenizer(tokenizer, folder / "tokenizer_2", pad="!")
    t5.save_pretrained(folder / "tokenizer_3")
    encoder = ("transformers", "CLIPTextModelWithProjection")
    write_index(folder, "StableDiffusion3Pipeline", {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": encoder,
        "text_encoder_2": encoder,
        "text_encoder_3": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL")})


def sd3_adapters(folder: Path) -> None:
    """Adapters of rank 4 as diffusers wrote them in 2024: without their alpha."""
    import torch
    from diffusers import StableDiffusion3Pipeline
    from peft import get_peft_model_state_dict

    pipe = StableDiffusion3Pipeline(sd3_transformer(), *[None] * 8)
    layers = get_peft_model_state_dict(add_lora(pipe).transformer)
    draw = torch.Generator().manual_seed(0)
    for x in layers.values(): x.normal_(0, .02, generator=draw)   # new adapters change nothing
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def cifar10_ddpm(folder: Path) -> None:
    """A DDPM whose files lie beside one another, as in diffusers' first repositories."""
    pipe = tiny_ddpm(32, 3, (16, 32, 32, 32))
    pipe.unet.save_pretrained(folder)
    write_old_weights(folder)
    betas = dict(beta_start=1e-4, beta_end=.02, beta_schedule="linear", trained_betas=None)
    usual = dict(clip_sample=True, num_train_timesteps=1000, variance_type="fixed_large")
    write_json(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler"} | betas | usual)
    parts = {"scheduler": ("diffusers", "DDPMScheduler"), "unet": ("diffusers", "UNet2DModel")}
    write_index(folder, "DDPMPipeline", parts)


def clip(folder: Path) -> None:
    from transformers import CLIPModel

    tokenizer = clip_tokenizer()
    seeded(0, lambda: CLIPModel(clip_config(tokenizer))).save_pretrained(folder)
    image_processor(32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_old_weights(folder)


# data sets, in parquet files as the Hub's are

def pictures(n: int, kind: int, sides: tuple[int, int], mode: str = "RGB") -> list:
    """Small random images, each unlike the others, of a colour that tells their kind; heights and widths are
    between the two `sides`.
    """
    from PIL import Image

    draw, images = np.random.default_rng(kind), []
    colour = draw.integers(0, 180, 3 if mode == "RGB" else 1)
    for _ in range(n):
        height, width = draw.integers(sides[0], sides[1] + 1, 2)
        pixels = (colour + draw.integers(0, 75, (height, width, len(colour)))).astype(np.uint8)
        images.append(Image.fromarray(pixels.squeeze()))
    return images


# what the captioned sets have beside image and caption: Hub id -> column -> whether it holds images
BESIDE = {
    "MohamedRashad/midjourney-detailed-prompts": {"long_prompt": False},
    "HighCWu/diffusiondb_2m_first_5k_canny": {"guide": True},
    "svjack/pokemon-blip-captions-en-ja": {"jp_text": False}}


def captioned(name: str, folder: Path) -> None:
    """One of the mixture's sets: all its rows in one file, and no card."""
    from datasets import Dataset, Features, Image, Value

    subset = SUBSETS["paper"][name]
    kind = [*SUBSETS["paper"]].index(name)
    columns = {
        subset.image: pictures(subset.rows, kind, (6, 12)),
        subset.caption: [f"{name.replace('_', ' ')}, number {i} of many" for i in range(subset.rows)]}
    types = {subset.image: Image(), subset.caption: Value("string")}
    for column, drawn in BESIDE.get(subset.where, {}).items():
        columns[column] = pictures(subset.rows, 100 + kind, (6, 12)) if drawn else ["…"] * subset.rows
        types[column] = Image() if drawn else Value("string")
    (folder / "data").mkdir(parents=True)
    parquet = folder / "data" / "train-00000-of-00001-0123456789abcdef.parquet"
    Dataset.from_dict(columns, Features(types)).to_parquet(parquet)


def labelled(name: str, folder: Path, config: str, rows: dict[str, int], side: int, mode: str) -> None:
    """A set of `IMAGE_SETS`, with a card that names its configuration; `rows` are split -> number."""
    from datasets import ClassLabel, Dataset, Features, Image

    kind = IMAGE_SETS[name]
    types = Features({kind.image: Image(), "label": ClassLabel(names=list(kind.classes))})
    card = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    (folder / config).mkdir(parents=True)
    for i, (split, n) in enumerate(rows.items()):
        labels = np.random.default_rng(i).integers(len(kind.classes), size=n).tolist()
        columns = {kind.image: pictures(n, i, (side, side), mode), "label": labels}
        Dataset.from_dict(columns, types).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", f"# {name}", ""]))


MODELS = {
    SD14: stable_diffusion,
    SD3: stable_diffusion_3,
    SD3_LORA: sd3_adapters,
    CIFAR10_DDPM: cifar10_ddpm,
    CLIP: clip}
_FEW = {"train": 1200, "test": 300}   # of real sets there are tens of thousands
DATASETS = {s.where: partial(captioned, name) for name, s in SUBSETS["paper"].items()} | {
    "ylecun/mnist": partial(labelled, "mnist", config="mnist", rows=_FEW, side=28, mode="L"),
    "uoft-cs/cifar10": partial(labelled, "cifar10", config="plain_text", rows=_FEW, side=32, mode="RGB")}
REPOSITORIES = {"models": MODELS, "datasets": DATASETS}   # kind -> Hub id -> what makes it in a folder


def make_repositories(folder: Path, names: list[str] | None = None) -> None:
    """Makes the repositories of those Hub ids, None: all, in `folder`/<kind>/<id>, unless they are there."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    for kind, by_name in REPOSITORIES.items():
        for name, make in by_name.items():
            place = folder / kind / name
            if place.exists() or names is not None and name not in names: continue
            partly = place.with_name(place.name + ".partly")
            shutil.rmtree(partly, ignore_errors=True)
            partly.mkdir(parents=True)
            with quiet_libraries(): make(partly)
            partly.rename(place)


# the server

class Repository:
    """A folder as the Hub tells of it."""

    def __init__(self, folder: Path):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path for path in files}
        contents = {name: path.read_bytes() for name, path in self.files.items()}
        self.digests = {name: hashlib.sha1(content).hexdigest() for name, content in contents.items()}
        self.commit = hashlib.sha1(json.dumps(self.digests).encode()).hexdigest()

    def has(self, revision: str) -> bool: return revision in ("main", self.commit)

    def about(self, name: str) -> dict:
        """What the Hub's API says of a repository."""
        siblings = [{"rfilename": file} for file in self.files]
        return {"id": name, "sha": self.commit, "private": False, "gated": False, "disabled": False,
                "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}

    def entry(self, path: str) -> dict | None:
        """What it says of a file or a folder; None where there is none."""
        if path in self.files:
            size = self.files[path].stat().st_size
            return {"type": "file", "path": path, "size": size, "oid": self.digests[path]}
        if not any(file.startswith(f"{path}/") for file in self.files): return None
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    def below(self, folder: str, recursive: bool) -> list[dict]:
        """The entries in a folder, "" for the repository's own; `recursive`: also those in its folders."""
        start, paths = f"{folder}/" if folder else "", set()
        for file in (file for file in self.files if file.startswith(start)):
            parts = file.removeprefix(start).split("/")
            depths = range(1, len(parts) + 1) if recursive else [1]
            paths.update(start + "/".join(parts[:depth]) for depth in depths)
        return [self.entry(path) for path in sorted(paths)]


class NotThere(Exception):
    """What the Hub does not have, by its name for it: Repo, Revision or Entry."""


API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Answers(BaseHTTPRequestHandler):
    """Answers as the Hub does."""
    protocol_version = "HTTP/1.1"   # which keeps connections open

    def log_message(self, *_): pass

    def do_GET(self): self.respond()
    def do_HEAD(self): self.respond()
    def do_POST(self): self.respond()

    def respond(self) -> None:
        """One request's answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        try:
            if asked := API.fullmatch(url.path):
                self.send_json(*self.told(asked, parse_qs(url.query), body))
            elif asked := FILE.fullmatch(url.path): self.send_file(asked)
            else: self.send(404)
        except NotThere as e:
            repository, what = e.args
            commit = {"X-Repo-Commit": repository.commit} if repository else {}
            self.send(404, headers={"X-Error-Code": f"{what}NotFound"} | commit)

    def repository(self, kind: str, name: str, revision: str = "main") -> Repository:
        """Raises `NotThere` for an unknown one, or one without such a revision."""
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            raise NotThere(None, "Repo")
        if not repository.has(unquote(revision)):
            raise NotThere(repository, "Revision")
        return repository

    def told(self, asked: re.Match, options: dict, body: bytes) -> tuple:
        """What the API says: the repository, and what becomes JSON."""
        kind, name, about, revision, path = asked.groups()
        repository, path = self.repository(kind, name, revision or "main"), unquote(path or "")
        if about == "paths-info":
            entries = [repository.entry(path) for path in parse_qs(body.decode()).get("paths", [])]
            return repository, [entry for entry in entries if entry]
        if about != "tree": return repository, repository.about(name)
        if path and (repository.entry(path) or {}).get("type") != "directory":
            raise NotThere(repository, "Entry")
        recursive = options.get("recursive", ["false"])[0].lower() == "true"
        return repository, repository.below(path, recursive)

    def send_json(self, repository: Repository, content) -> None:
        headers = {"Content-Type": "application/json", "X-Repo-Commit": repository.commit}
        self.send(200, json.dumps(content).encode(), headers)

    def send_file(self, asked: re.Match) -> None:
        """A file, or the range of it that is asked for. Raises `NotThere`."""
        datasets, name, revision, path = asked.groups()
        repository = self.repository("datasets" if datasets else "models", name, revision)
        path = unquote(path)
        if path not in repository.files:
            raise NotThere(repository, "Entry")
        content = repository.files[path].read_bytes()
        headers = {"ETag": f'"{repository.digests[path]}"', "X-Repo-Commit": repository.commit,
                   "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not part or not any(part.groups()):
            self.send(200, content, headers)
            return
        first, last = part.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        if start > end: self.send(416, headers=headers | {"Content-Range": f"bytes */{len(content)}"})
        else:
            place = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            self.send(206, content[start:end + 1], headers | place)

    def send(self, status: int, content: bytes = b"", headers: dict = {}) -> None:
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)


class StandIn(ThreadingHTTPServer):
    """Serves the repositories of a folder on this machine alone; `port` 0 takes a free one."""
    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Answers)
        self.repositories = {}
        for kind, by_name in REPOSITORIES.items():
            there = [name for name in by_name if (folder / kind / name).exists()]
            for name in there: self.repositories[kind, name] = Repository(folder / kind / name)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(folder: Path):
    """While open, the repositories of a folder are served; gives the address for HF_ENDPOINT."""
    with StandIn(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield server.address
        finally: server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    make_repositories(args.folder)
    with StandIn(args.folder, args.port) as server:
        print(server.address, flush=True)
        try: server.serve_forever()
        except KeyboardInterrupt: pass
