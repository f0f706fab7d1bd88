"""Make safetensors of a network of EDM2 (NVlabs/edm2), whose published files are pickles that carry source code.

git clone https://github.com/NVlabs/edm2
python scripts/edm2_to_safetensors.py edm2-img512-xs-2147483-0.135.pkl --code edm2
ldm convert edm2-img512-xs-2147483-0.135.safetensors --autoencoder logs/<run>

Opening such a pickle runs the code in it. Do it where you would run that code: with a file that you trust, on a machine
of no consequence. This script needs torch, numpy and safetensors, nothing of ldm. It writes the tensors under their own
names, and a JSON beside them with what else the pickle knows.
"""

import argparse
import importlib
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description="Make safetensors of EDM2's pickle. Runs the code in the pickle.")
    parser.add_argument("pickle", type=Path, help="a network of EDM2, .pkl")
    parser.add_argument("--code", type=Path, help="folder of their repository (default: where Python finds it)")
    parser.add_argument("--out", type=Path, help="the .safetensors to write (default: beside the pickle)")
    chosen = parser.parse_args()
    if chosen.code is not None:
        sys.path.insert(0, str(chosen.code))
    file, out = chosen.pickle, chosen.out or chosen.pickle.with_suffix(".safetensors")
    from safetensors.torch import save_file  # and torch: nobody waits for them who only asks for --help

    data = opened(file)
    network = data["ema"]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named(network)}
    said = description(data, file)
    save_file(tensors, out)
    out.with_suffix(".json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    print(f"{out}  {len(tensors)} tensors; beside it {out.with_suffix('.json').name}")


def opened(file: Path) -> Any:
    """What the pickle holds; exits with a message where it cannot be opened."""
    try:
        for module in ("dnnlib", "torch_utils.persistence"):  # the pickle's code imports both
            importlib.import_module(module)
    except ImportError as error:
        sys.exit(
            f"{error.name or error}: EDM2's code cannot be imported, without which its pickles cannot be opened. Clone "
            f"https://github.com/NVlabs/edm2 and name its folder: --code FOLDER"
        )
    try:
        with file.open("rb") as handle:
            data = pickle.load(handle)  # runs the code that the file carries, see above
    except OSError as error:
        sys.exit(f"{file}: cannot be read: {error.strerror}")
    except (pickle.UnpicklingError, EOFError, ImportError, AttributeError) as error:
        sys.exit(f"{file}: cannot be opened as a pickle of EDM2: {error}")
    if not isinstance(data, dict) or not any(name.startswith("unet.") for name, _ in named(data.get("ema"))):
        sys.exit(f"{file}: expected a dictionary with a network of EDM2 under `ema`")
    return data


def named(network: Any) -> list[tuple[str, Any]]:
    """(name, tensor) of its state."""
    import torch

    return [*network.state_dict().items()] if isinstance(network, torch.nn.Module) else []


def description(data: Any, file: Path) -> dict[str, Any]:
    """What the pickle and its name say besides the weights, in plain values."""
    network = data["ema"]
    kept = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data")
    said: dict[str, Any] = {name: getattr(network, name) for name in kept}
    plain = (bool, int, float, str, list)
    said |= {name: value for name, value in network.init_kwargs.items() if isinstance(value, plain)}
    loss, encoder = (vars(data[name]) if data.get(name) is not None else {} for name in ("loss_fn", "encoder"))
    said |= {name: float(loss[name]) for name in ("P_mean", "P_std") if name in loss}
    said |= {"vae_name": encoder["vae_name"]} if "vae_name" in encoder else {}
    said |= {f"encoder_{name}": numbers(encoder[name]) for name in ("scale", "bias") if name in encoder}
    # Snapshots of an average are called <name>-<thousands of images>-<relative width>.
    if found := re.fullmatch(r".*-(\d+)-(\d+\.\d+)", file.stem):
        said |= {"kimg": int(found[1]), "ema_std": float(found[2])}
    return said


def numbers(values: Any) -> list[float]:
    import torch

    return [float(value) for value in torch.as_tensor(values).flatten()]


if __name__ == "__main__":
    main()
