"""How good the bundled model is: bits per byte on the held-out modules against xz, and greedy completions of their functions.

Hard fact: every byte counts and every token is scored once; a token is scored with at least half a window of context, except where its
file has no more before it.

A completion passes when Python parses it. The prompt is the module's text from up to 400 tokens before a function's header to the end of
that header; the model adds at most 200 tokens, greedily. If it did not end by itself, its last line is dropped as unfinished, and then
further last lines as long as Python says that the text is incomplete (an open bracket or string, an `if` without a body). A real error
anywhere in what was written fails it: it is never cut back to before an error. What is left must hold the header and at least one
statement of its body.
"""

import ast
import lzma
import math
import warnings

import torch
import torch.nn.functional as F

PROMPT, ADDED, COMPLETIONS = 400, 200, 40
_INCOMPLETE = 0x4000  # codeop.PyCF_ALLOW_INCOMPLETE_INPUT (Python 3.11+): an unfinished text is told from a wrong one


@torch.no_grad()
def bits_per_byte(model, pieces, texts, window):
    """A file is BOS, its tokens, EOS; the file's end is scored too, as a reader must know where it stops."""
    was = model.training
    model.eval()
    nats = count = 0.0
    for text in texts.values():
        ids = torch.tensor([1, *pieces.encode(text), 2])
        count += len(text.encode())
        scored = 1  # ids[:scored] need no more scoring; BOS is given
        while scored < len(ids):
            begin = max(0, scored - window // 2)
            end = min(len(ids), begin + window + 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=was):  # in training speed counts, in the verdict exactness
                logits = model(input_ids=ids[None, begin : end - 1], use_cache=False).logits[0]
            logits = logits[scored - 1 - begin :].float()
            nats += F.cross_entropy(logits, ids[scored:end], reduction="sum").item()
            scored = end
    model.train(was)
    return nats / math.log(2) / count


def xz_bits_per_byte(texts):
    data = "".join(texts.values()).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def headers(text):
    """(first line, line after the header, indentation) of every function that has a body of its own below its header."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
            last = node.args.args[-1:] + node.args.kwonlyargs[-1:] + [d for d in [node.returns] if d]
            end = max([node.lineno, *(a.end_lineno for a in last)])
            lines = text.splitlines()
            while not lines[end - 1].split("#")[0].rstrip().endswith(":"):
                end += 1
            if end < node.body[0].lineno:
                yield node.lineno - 1, end, node.col_offset


def choose_prompts(texts, pieces):
    """The same 40 functions every time, evenly spread over all of the held-out ones: (name, context, header, indentation)."""
    found = [(path, *spot) for path, text in sorted(texts.items()) for spot in sorted(headers(text))]
    for i in range(COMPLETIONS):
        path, begin, end, indent = found[(2 * i + 1) * len(found) // (2 * COMPLETIONS)]
        lines = texts[path].splitlines(True)
        header, first = "".join(lines[begin:end]), begin
        while first and len(pieces.encode("".join(lines[first - 1 : end]))) < PROMPT:
            first -= 1
        yield f"{path}:{begin + 1}", "".join(lines[first:begin]), header, indent


def _parse(text):
    """The text's tree, None if only its end is missing; a real error is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except SyntaxError as error:
            try:
                compile(text, "completion", "exec", ast.PyCF_ONLY_AST | _INCOMPLETE)
            except SyntaxError as again:
                if "incomplete input" in str(again):
                    return None
            raise error


def passes(header, added, indent, ended):
    """(whether the completion passes, the text that was kept)."""
    # Enclosing blocks stand in for the class or function around the header, so that methods keep their indentation.
    around = "".join(" " * i + "if 1:\n" for i in range(0, indent, 4))
    lines = added.splitlines(True)
    if not ended:
        lines = lines[:-1]
    for kept in range(len(lines), 0, -1):
        text = header + "".join(lines[:kept])
        try:
            tree = _parse(around + text)
        except SyntaxError:
            return False, text
        if tree is not None:
            return True, text
    return False, header


@torch.no_grad()
def greedy(model, ids, most):
    """At most `most` ids after `ids`, without the EOS, and whether EOS came."""
    state, made = None, []
    given = torch.tensor([ids])
    for _ in range(most):
        out = model(input_ids=given, past_key_values=state, use_cache=True)
        state, best = out.past_key_values, int(out.logits[0, -1].argmax())
        if best == 2:
            return made, True
        made.append(best)
        given = torch.tensor([[best]])
    return made, False


def complete(model, pieces, texts, show=print):
    """How many of the 40 completions pass."""
    passed = 0
    for name, context, header, indent in choose_prompts(texts, pieces):
        prompt = [1, *pieces.encode(context + header)]
        made, ended = greedy(model, prompt, ADDED)
        added = pieces.decode(prompt[1:] + made)[len(context + header) :]
        good, text = passes(header, added, indent, ended)
        passed += good
        show(f"--- {'passes' if good else 'FAILS'}: {name}\n{text}")
    return passed
