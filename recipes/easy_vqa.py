"""easy-VQA (github.com/vzhou842/easy-VQA, MIT) as rows with pictures, and how well a model answers its questions.

    python recipes/easy_vqa.py prepare easy-VQA/easy_vqa/data easy-vqa     # train, validation, test .jsonl and pictures
    python recipes/easy_vqa.py score easy-vqa runs/pictures/model          # accuracy on the test questions

`prepare` takes the folder of train/ and test/, each with questions.json (or .json.gz) and images/ (or images.zip). The
test split stays apart; validation is every twentieth training picture. `score` answers each test question with its
picture, and the same questions without; beside both stands the share of the most frequent answer.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import shutil
import zipfile
from pathlib import Path

from encore.generate.sampling import SamplingSettings
from encore.generate.text import TextGenerator


def prepare(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": [], "test": []}
    for split in ("train", "test"):
        pictures = out / split
        packed = source / split / "images.zip"
        if packed.is_file():
            with zipfile.ZipFile(packed) as archive:
                pictures.mkdir(exist_ok=True)
                for name in archive.namelist():
                    if name.endswith(".png"):
                        (pictures / Path(name).name).write_bytes(archive.read(name))
        else:
            shutil.copytree(source / split / "images", pictures, dirs_exist_ok=True)
        plain = source / split / "questions.json"
        text = plain.read_bytes() if plain.is_file() else gzip.decompress(Path(f"{plain}.gz").read_bytes())
        for question, answer, picture in json.loads(text):
            part = "validation" if split == "train" and picture % 20 == 0 else split
            rows[part].append({"src": question, "tgt": answer, "images": [f"{split}/{picture}.png"]})
    for part, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (out / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{out / part}.jsonl: {len(found):,} questions")


def score(folder: Path, model: str, most: int) -> None:
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()][:most]
    questions, answers = [row["src"] for row in rows], [row["tgt"] for row in rows]
    generator = TextGenerator.load(model, vision=True)
    settings = SamplingSettings(max_target_tokens=8)
    pictures = [[str(folder / name) for name in row["images"]] for row in rows]
    seen = [a.text.strip() for a in generator.generate(questions, settings, batch_size=64, pictures=pictures)]
    blind = [a.text.strip() for a in generator.generate(questions, settings, batch_size=64)]
    frequent = collections.Counter(answers).most_common(1)[0][0]

    def accuracy(given: list[str]) -> float:
        return sum(a == b for a, b in zip(given, answers, strict=True)) / len(answers)

    result = {
        "questions": len(rows),
        "accuracy": accuracy(seen),
        "without_pictures": accuracy(blind),
        "most_frequent_answer": accuracy([frequent] * len(rows)),
    }
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("prepare")
    make.add_argument("source", type=Path)
    make.add_argument("out", type=Path)
    test = verbs.add_parser("score")
    test.add_argument("folder", type=Path)
    test.add_argument("model")
    test.add_argument("--most", type=int, default=2000, help="so many of the test questions")
    args = parser.parse_args()
    prepare(args.source, args.out) if args.verb == "prepare" else score(args.folder, args.model, args.most)


if __name__ == "__main__":
    main()
