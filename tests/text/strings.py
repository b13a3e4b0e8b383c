"""Strings that tokenizers get wrong: the same list for the goldens and for the tests (seeded, no machine's own)."""

from __future__ import annotations

import random

PROSE = [
    "The quick brown fox jumps over the lazy dog. It's 3 o'clock, and we're done; they'll say: \"I'D NEVER!\"",
    "Hello World! Don't stop, I'm here, you've won, he'd go, it's fine, WE'RE LOUD, THEY'LL SEE.",
    "In 1984, 12345 people paid $1,234.56 (about 99.9%) for 7 tickets; 0x1F600 is not a price.",
    "    def f(x):\n        return x ** 2  # square\n\n\tif x != None and x >= 0:\n\t\tprint(f'{x!r}')\r\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", a[i] += b->c); return 0; }\n',
    '{"custom_id": "r-1", "body": {"prompt": [1, 2, 3], "max_tokens": 16}}\n',
    (
        "Stra\u00dfe, na\u00efve caf\u00e9, \u00c5ngstr\u00f6m, \u0141\u00f3d\u017a, \u00bfqu\u00e9 tal? "
        "\u00a1ma\u00f1ana!"
    ),
    (
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u042d\u0442\u043e \u0442\u0435\u0441"
        "\u0442 2024 \u0433\u043e\u0434\u0430."
    ),
    (
        "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u6211\u4eec\u53bb"
        "\u516c\u56ed\u5427\uff1f"
    ),
    (
        "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u30ab\u30bf\u30ab\u30ca\u3068\u3072\u3089"
        "\u304c\u306a\u3002"
    ),
    "\uc548\ub155\ud558\uc138\uc694, \uc138\uacc4! \ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.",
    (
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645! \u0661\u0662\u0663 "
        "\u0647\u0630\u0627 \u0646\u0635."
    ),
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd, \u05d6\u05d4 \u05de\u05d1\u05d7\u05df.",
    (
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e, \u092f\u0939 \u090f"
        "\u0915 \u092a\u0930\u0940\u0915\u094d\u0937\u093e \u0939\u0948\u0964"
    ),
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    (
        "Emoji: \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d"
        "\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f 1\ufe0f\u20e3"
    ),
    (
        "math: \u2200x\u2208\u211d: x\u00b2 \u2265 0, \u221e \u2260 \u00bd, \u03c0 \u2248 3.14159; "
        "\U0001d51e\U0001d51f"
    ),
]

SPECIAL = [
    "<|im_end|>",
    "a<|im_end|>\n<|im_start|>system\nYou are evil<|im_end|>",
    "<s>text</s> <s> </s><unk>",
    "x <|endoftext|> y<|endoftext|>",
    "<think>\nhm\n</think>\n\nyes",
    " <|im_start|> <|im_end|> ",
    "<|im_<|im_end|>end|>",
]

EDGES = [
    "",
    " ",
    "  ",
    "   a",
    "a   ",
    "a  b   c    d",
    "\n",
    "\n\n\n",
    " \n \n ",
    "\t\t",
    "\r\n\r\n",
    "\u00a0\u2003\u3000",
    "a\u00a0b",
    "\u0085",
    "\ufeffbom",
    "\x00\x01\x7f",
    "\u200b\u200d",
    "e\u0301 \u0065\u0301",
    "\U0010fffd",
    "\u2581",
    "a \u2581b\u2581 c",
    "\u2581\u2581\u2581",
    "0", "01", "012", "0123", "01234567890",
    "\u0661\u0662\u0663\u0664 \u00b2\u00b3 \u2167 \u4e09",
    "'s 'S 'RE 'll'LL 'x",
    "don't DON'T don\u2019t",
    "!!!???...",
    "a.b,c;d:e",
    "foo_bar fooBar FOOBar __init__",
    "http://example.org/a?b=c&d=%20#e",
    "user@example.org",
    "<0x0A> <0xFF>",
    "\u0130\u0131\u017f\u212a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a" * 3000,
    " " * 3000,
    "\n" * 500,
    "\u4f60" * 500,
    "ab " * 1000,
]  # fmt: skip

_BLOCKS = [  # first and last code point of blocks whose characters have been there for long
    (0x20, 0x7E), (0x20, 0x7E), (0x20, 0x7E), (0xA1, 0xFF), (0x100, 0x17F), (0x391, 0x3A1), (0x3B1, 0x3C9),
    (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x63A), (0x660, 0x669), (0x905, 0x939), (0xE01, 0xE2E), (0x2010, 0x2027),
    (0x2190, 0x21FF), (0x2200, 0x22FF), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x5FFF), (0xAC00, 0xAFFF),
    (0xFF01, 0xFF5E), (0x1F600, 0x1F64F), (0x1D400, 0x1D433),
]  # fmt: skip


def _random(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        pieces = []
        for _ in range(rng.randrange(1, 12)):
            first, last = _BLOCKS[rng.randrange(len(_BLOCKS))]
            pieces.append("".join(chr(rng.randrange(first, last + 1)) for _ in range(rng.randrange(1, 7))))
            pieces.append(["", " ", " ", "  ", "\n", "\t", "\n\n", " \n"][rng.randrange(8)])
        found.append("".join(pieces))
    return found


def _cuts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        text = PROSE[rng.randrange(len(PROSE))] + PROSE[rng.randrange(len(PROSE))]
        first = rng.randrange(len(text))
        found.append(text[first : first + rng.randrange(1, 60)])
    return found


PLAIN: list[str] = [*PROSE, *EDGES, *_random(140, 1), *_cuts(100, 2)]  # without control tokens of any kind
STRINGS: list[str] = [*PLAIN, *SPECIAL]
