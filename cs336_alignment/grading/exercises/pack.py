import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer
from cs336_alignment.tokens import pack


def documents(g, lengths):
    return [torch.randint(0, 50, (n,), generator=g).tolist() for n in lengths]


def lengths(g, number, most=9):
    return [integer(g, 1, most) for _ in range(number)]


def ragged(g, block=4):
    """Documents shorter and longer than a row, with an incomplete row at the end."""
    found = [block + 1, 2, 3 * block + 1, *lengths(g, 3)]
    return documents(g, [*found, (block + 1 - sum(found)) % block]), block


def full(g, block=5):
    """Documents that fill the last row exactly, one of them empty."""
    found = [2, 0, block + 1, *lengths(g, 2)]
    return documents(g, [*found, block + (-sum(found)) % block]), block


def too_few(g, block):
    return documents(g, [block // 2, block - 1 - block // 2]), block


def stream(docs):
    return [token for document in docs for token in document]


def enough(docs, block):
    if sum(map(len, docs)) < block:
        raise ValueError("not one row")


def with_lists(docs, block):
    enough(docs, block)
    joined = stream(docs)
    rows = [joined[i : i + block] for i in range(0, len(joined), block)]
    return torch.tensor([row for row in rows if len(row) == block])


def with_cat(docs, block):
    joined = torch.cat([torch.tensor(document, dtype=torch.long) for document in docs])
    if joined.numel() < block:
        raise ValueError("not one row")
    return torch.stack([part for part in joined.split(block) if len(part) == block])


def one_by_one(docs, block):
    rows, row = [], []
    for document in docs:
        for token in document:
            row.append(token)
            if len(row) == block:
                rows, row = [*rows, row], []
    if not rows:
        raise ValueError("not one row")
    return torch.tensor(rows, dtype=torch.int64)


def with_unfold(docs, block):
    joined = torch.tensor(stream(docs))
    if joined.shape[0] // block == 0:
        raise ValueError("not one row")
    return joined.unfold(0, block, block)


def rows_of(parts, block):
    return torch.tensor([part for part in parts if len(part) == block], dtype=torch.long).reshape(-1, block)


def cut(joined, block, step=None):
    return rows_of([joined[i : i + block] for i in range(0, len(joined), step or block)], block)


def wrongly(make):
    def function(docs, block):
        enough(docs, block)
        return make(docs, block)

    return function


def apart(docs, block):
    """Each document cut by itself, its rest dropped."""
    return rows_of([d[i : i + block] for d in docs for i in range(0, len(d), block)], block)


def with_rest(docs, block):
    joined = stream(docs)
    return cut(joined + [0] * (-len(joined) % block), block)


def row_a_document(docs, block):
    return torch.tensor([d[:block] + [0] * (block - len(d)) for d in docs])


def whole_documents(docs, block):
    """A document that does not fit into what is left of a row begins a new one."""
    rows, row = [], []
    for document in docs:
        if len(row) + len(document) > block:
            rows, row = [*rows, row], []
        row = row + document[:block]
    return torch.tensor([(r + [0] * block)[:block] for r in [*rows, row]])


EXERCISE = Exercise(
    name="pack",
    assignment="a1_sft",
    order=6,
    points=5,
    minutes=10,
    lecture="02_sft_mechanics",
    equation="2.13",
    parameters=("documents", "block_size"),
    reference=pack,
    cases=(
        Case(
            "documents of different lengths",
            "all documents end to end, cut into rows of block_size tokens; the incomplete last row is dropped",
            lambda g: [ragged(g), ragged(g, 6)],
            1,
            visible=True,
        ),
        Case(
            "exactly filled, and too few",
            "nothing is dropped where the last row is full; ValueError where there is not one full row",
            lambda g: [full(g), too_few(g, 6), full(g, 3)],
            1,
            visible=True,
        ),
        Case(
            "other documents",
            "right for any documents and block size",
            lambda g: [ragged(g, integer(g, 3, 9)), ragged(g, 2), full(g, integer(g, 4, 7)), ragged(g, 5)],
            2,
        ),
        Case(
            "other totals",
            "one row if the tokens are exactly enough, ValueError if one is missing",
            lambda g: [(documents(g, [3, 4]), 7), too_few(g, 8), (documents(g, [0, 6, 0, 2]), 4), too_few(g, 3)],
            1,
        ),
    ),
    mistakes=(
        Mistake(
            "Each document is cut by itself and its rest is lost: join all documents first, a row may hold several.",
            wrongly(apart),
        ),
        Mistake("The incomplete last row is padded; it must be dropped.", wrongly(with_rest)),
        Mistake("A document a row is padding, not packing: join all documents first.", wrongly(row_a_document)),
        Mistake(
            "A document that does not fit begins a new row; a row must be full, and documents run over into the next.",
            wrongly(whole_documents),
        ),
        Mistake(
            "A token is put between documents; they bring their own <end>.",
            wrongly(lambda docs, block: cut(stream([d + [0] for d in docs]), block)),
        ),
        Mistake(
            "The rows overlap by one token; every token must be in one row.",
            wrongly(lambda docs, block: cut(stream(docs), block, block - 1)),
        ),
        Mistake("The rows have block_size + 1 tokens.", wrongly(lambda docs, block: cut(stream(docs), block + 1))),
        Mistake(
            "A full last row is dropped: only an incomplete one goes.",
            wrongly(lambda docs, block: cut(stream(docs)[:-1], block)),
        ),
        Mistake(
            "The beginning of the stream is dropped; drop its end.",
            wrongly(lambda docs, block: cut(stream(docs)[sum(map(len, docs)) % block :], block)),
        ),
        Mistake(
            "The stream runs down the columns; it must run along the rows.",
            wrongly(lambda docs, block: cut(stream(docs), block).reshape(block, -1).T),
        ),
        Mistake(
            "The documents are sorted by length; keep their order.", lambda d, block: pack(sorted(d, key=len), block)
        ),
        Mistake("Too few tokens for one row must raise ValueError.", lambda docs, block: cut(stream(docs), block)),
        Mistake("Return one tensor, not a list of rows.", lambda docs, block: list(pack(docs, block).unbind())),
    ),
    wrong=(
        wrongly(lambda docs, block: cut(stream(docs), block).flip(0)),
        wrongly(lambda docs, block: cut(stream(dict.fromkeys(map(tuple, docs[::-1]))), block)),
        wrongly(lambda docs, block: cut(stream(docs), block)[:1]),
    ),
    unusual=(with_lists, with_cat, one_by_one, with_unfold),
    stripped=("tokens.pack",),
)
