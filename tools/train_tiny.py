"""Makes the bundled model: corpus, tokenizer, training, validation, Hugging Face folder, packed store.

    python tools/train_tiny.py --work DIR all --minutes 180        every step; `--help` names them one by one
    echo 25 > DIR/DECAY                                            end it: the learning rate falls to zero within 25 minutes

Hard fact: the model is only as reproducible as its schedule, which follows the clock (tiny_training.py); corpus and tokenizer are exact.
Needs torch and transformers (extra `dev`) and CPython 3.11.7's standard library (`--stdlib`, by default the running Python's).
"""

import io
import os
import sys

if __name__ == "__main__" and "THP_MEM_ALLOC_ENABLE" not in os.environ:
    # Large tensors come and go every step; keeping their pages and making them huge saves a fifth of the time. glibc reads these at start.
    os.environ.update(
        THP_MEM_ALLOC_ENABLE="1",
        GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184",
        GOMP_SPINCOUNT="0",  # a thread that waits for its partner gives its core away: the partner may be waiting for one
    )
    os.execv(sys.executable, [sys.executable, *sys.argv])

from pathlib import Path

import click
import sentencepiece

import tiny_corpus


def tokenizer_path(work):
    return work / "tokenizer.model"


def load_tokenizer(work):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path(work)))


@click.group()
@click.option(
    "--stdlib", type=click.Path(path_type=Path, exists=True), default=tiny_corpus.default_stdlib, help="CPython 3.11.7's lib/python3.11."
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for checkpoints and results, outside the repository.")
@click.option("--threads", default=2, show_default=True)
@click.pass_context
def main(ctx, stdlib, work, threads):
    """Train npmix's bundled model."""
    import torch

    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    ctx.obj = (stdlib, work)


@main.command()
@click.pass_obj
def tokenizer(obj):
    """Train the sentencepiece model, with Mixtral's settings and a smaller vocabulary."""
    stdlib, work = obj
    texts = tiny_corpus.read_corpus(stdlib, "train")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts.values() for line in text.splitlines(True)),
        model_writer=made,
        model_type="bpe",
        vocab_size=2048,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=0.9995,
        max_sentence_length=1 << 20,
        num_threads=2,
        minloglevel=1,
    )
    tokenizer_path(work).write_bytes(made.getvalue())


@main.command()
@click.option(
    "--minutes", default=180.0, show_default=True, help="Active time; its last quarter is the decay unless a file DECAY comes first."
)
@click.option("--length", default=512, show_default=True, help="Sequence length before the decay.")
@click.option("--nice", default=19, show_default=True, help="How far to stand back behind other processes.")
@click.option("--again", is_flag=True, help="After a finished decay: back to the full rate, and on.")
@click.pass_obj
def train(obj, minutes, length, nice, again):
    """Train, or go on from the last checkpoint in the work folder."""
    import torch

    import tiny_training
    import tiny_validate

    stdlib, work = obj
    os.nice(nice)
    pieces = load_tokenizer(work)
    texts = tiny_corpus.read_corpus(stdlib, "train")

    def document(parts):
        return torch.tensor([i for part in parts for i in (1, *pieces.encode(part), 2)], dtype=torch.int16)

    files = [(document([text]), document(tiny_corpus.split_definitions(text))) for text in texts.values()]
    held = {path: tiny_corpus.read_corpus(stdlib, "held")[path] for path in tiny_corpus.PIECE}
    print(f"{len(files)} files, {sum(len(whole) for whole, _ in files):,} tokens", flush=True)
    trainer = tiny_training.Trainer(work, files, again)
    trainer.run(minutes, length, lambda model: tiny_validate.bits_per_byte(model, pieces, held, window=512))


@main.command()
@click.pass_obj
def corpus(obj):
    """Write the list of files anew from a library. Only for a new corpus: the list in the repository is the corpus."""
    rows = tiny_corpus.write_list(obj[0])
    print(f"{len(rows)} files, {sum(row[0] == 'held' for row in rows)} of them held out")


@main.command()
@click.pass_obj
def heldout(obj):
    """Write heldout.txt, the piece of held-out text that the tests carry."""
    stdlib, work = obj
    text = tiny_corpus.held_piece(stdlib)
    (work / "heldout.txt").write_text(text, encoding="utf-8", newline="")
    print(f"{len(text.encode()):,} bytes, {len(load_tokenizer(work).encode(text)):,} tokens")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--mean",
    "steps",
    multiple=True,
    type=int,
    metavar="STEP",
    help="The mean of the weights at these steps of the curve, not the last ones.",
)
@click.pass_obj
def export(obj, folder, steps=()):
    """Write the last checkpoint as a Hugging Face folder: bfloat16, standard tensor names, tokenizer.

    When the held-out loss has stopped falling, the mean of a few weights before its turn is better than any of them
    (Izmailov et al. 2018, arXiv 1803.05407).
    """
    import shutil

    import torch

    import tiny_model
    from tiny_training import weights_at

    _, work = obj
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    weights = [torch.load(weights_at(work, step), weights_only=True) for step in steps] or [state["model"]]
    model = tiny_model.make_model()
    model.load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]})
    model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    shutil.copyfile(tokenizer_path(work), folder / "tokenizer.model")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: step {', '.join(map(str, steps)) or state['step']}, {size:,} bytes")
    if size > 17_000_000:
        raise SystemExit("larger than the 17 MB that the repository can take")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--window", default=2048, show_default=True, help="Tokens of context at most; every token gets half of it.")
@click.option("--completions/--no-completions", default=True, help="Also complete 40 held-out functions.")
@click.pass_obj
def validate(obj, folder, window, completions):
    """Measure an exported folder on the held-out modules."""
    import torch
    from transformers import MixtralForCausalLM

    import tiny_model
    import tiny_validate

    texts = tiny_corpus.read_corpus(obj[0], "held")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tiny_model.training_forms(model):
        bits = tiny_validate.bits_per_byte(model, pieces, texts, window)
    xz = tiny_validate.xz_bits_per_byte(texts)
    if completions:
        passed = tiny_validate.complete(model, pieces, texts)
        print(f"completions that parse: {passed} of {tiny_validate.COMPLETIONS}")
    print(f"held-out bits per byte: {bits:.4f}; xz -9e: {xz:.4f}; {1 - bits / xz:.1%} fewer")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def convert(folder, out):
    """Pack an exported folder at 8 bits, as the package carries it."""
    import subprocess

    subprocess.run([sys.executable, "-m", "npmix", "convert", str(folder), str(out), "--quant", "q8"], check=True)


@main.command(name="all")
@click.option("--minutes", default=180.0, show_default=True)
@click.pass_context
def everything(ctx, minutes):
    """Every step in turn; training goes on from its checkpoint if there is one."""
    work = ctx.obj[1]
    if not tokenizer_path(work).exists():
        ctx.invoke(tokenizer)
    ctx.invoke(heldout)
    ctx.invoke(train, minutes=minutes)
    ctx.invoke(export, folder=work / "hf")
    ctx.invoke(validate, folder=work / "hf")
    ctx.invoke(convert, folder=work / "hf", out=work / "packed")


if __name__ == "__main__":
    main()
