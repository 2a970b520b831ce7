"""Stand-in for ComfyUI's folders: one list of folders by kind, which a test sets."""

from pathlib import Path

folders: dict[str, list[str]] = {}


def get_folder_paths(kind):
    return folders[kind]


def get_filename_list(kind):
    roots = [Path(root) for root in folders[kind]]
    return sorted(str(p.relative_to(root)) for root in roots for p in root.rglob("*.safetensors"))


def get_full_path_or_raise(kind, name):
    for root in folders[kind]:
        if (path := Path(root) / name).is_file():
            return str(path)
    raise FileNotFoundError(f"{name} is in no folder of {kind}")
