"""500 texts that tokenizers get wrong: digits, spaces, scripts, emoji, control characters, look-alikes, code.

`awkward_texts()` is the same list everywhere: it draws with `random.Random(seed).random()` alone, whose stream Python
guarantees. Fixtures keep ids only. Also used by `tests/make_tokenizer_fixtures.py`: no import of twinmesh here.
"""
# ruff: noqa: RUF001 (the look-alikes are what is tested)

import random

COUNT = 500

HAND_MADE = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    " \n \n  \n",
    "a",
    " a",
    "a ",
    "Hello, world!",
    "  leading and trailing  ",
    "a   b    c\t\td\n\n\ne",
    "line one\r\nline two\r\n",
    "In 2024, 3.14159 is 1000000 times ½ of ٣ and ²³ or Ⅻ",
    "1234567890 12 345 6,789.01 0x1F 1e-9 007",
    "It's we'll I'd they've 'quoted' CAN'T I'M WE'RE it’s",
    "x'S y'LL z'rE 'ſ",
    "日本語のテキストと中文文本，한국어도",
    "Здравствуйте, мир! Γειά σου Κόσμε",
    "สวัสดีชาวโลก नमस्ते दुनिया שלום עולם مرحبا بالعالم",
    "👋🏽 family: 👨‍👩‍👧‍👦 flags 🇫🇷🇯🇵",
    "e\u0301 versus \u00e9, A\u030a or \u212b or \u00c5, and \u200bzero\u200dwidth",
    "ﬁ ﬂ ①②③ ｆｕｌｌ ㍿ ﷺ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "\x00\x01\x1b[0m control \x7f\x85\u2028\u2029",
    "\u00a0no-break\u3000ideographic\u2003em space\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start |> <|im_end <|endoftext| > not special",
    "<s>[INST] hi [/INST]</s><unk><pad><bos><eos>",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<think>\nhm\n</think>\n\n<tool_call>\n{}\n</tool_call>",
    "<0x0A><0xFF>▁▁ <0x41>",
    "Ġthe Ċ Ã©",
    "def f(x):\n    return x**2  # square\n\n\n        nested\n\tmixed",
    'for (int i = 0; i < n; ++i) { printf("%d\\n", a[i] ?: -1); } // done',
    "https://example.org/a_b-c?d=1&e=%20#f me@example.org C:\\dir\\file.txt",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n* item\n1. item\n```py\npass\n```",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "camelCaseWords HTTPServer2Go snake_case_word SCREAMING_SNAKE iPhone15Pro",
    "ⅣⅤ ٠١٢٣٤٥٦٧٨٩ 〇一二三 ௧௨௩ 𝟏𝟐𝟑 ½⅓",
    "......!!!???---___***===+++~~~```^^^$$$",
    "«Quoted» „so“ “and” ‘so’ — dash – en-dash … ellipsis",
    "a\u0300\u0301\u0302\u0303\u0304b Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    "가나다 각 \u1100\u1161\u11a8 が か\u3099",
    "\U0001d11e \U0001f9d1\u200d\U0001f680 \U000e0067 \U0010ffff \ufffd \ufffe",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "                                                                ",
    "\n" * 40,
    "\t" * 40,
]
PIECES = [
    *HAND_MADE[9:46],
    *"0123456789",
    *" \n\t\r",
    *"aAbBzZéÉßñøæœıİſ",
    *".,;:!?'\"-_()[]{}<>|/\\@#$%^&*+=~`",
    *"あアー亜漢字中文，。「」가힣ㄱ",
    *"абвЯΩλאבעربहिंกำ",
    *["the", " the", " and", "ing", "ers", "The", " of", "'s", "'ll", " '", "''", "://", "();", " == ", "    ", "  "],
    *["😀", "👍🏿", "🏳️‍🌈", "❤️", "🇩🇪", "\u200d", "\ufe0f", "\u200b", "\u00a0", "\u3000", "\u2009", "\u0301", "\u0308"],
    *["\x00", "\x07", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\U000f0000", "\ud7ff", "\ue000"],
    *["<|", "|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<bos>", "▁"],
    *["<|im_end", "<end_of_turn>", "<start_of_turn>", "[INST]", "<0x0A>", "<0x", "<think>", "<|end_header_id|>"],
]


def awkward_texts():
    """Make the texts: hand-made ones first, then mixtures of pieces and of single characters from all of Unicode."""
    draw = random.Random(20240501).random

    def below(n):
        return int(draw() * n)

    def character():
        ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x600), (0x900, 0xE80), (0x2000, 0x2C00), (0x3000, 0xA000)]
        ranges += [(0xAC00, 0xD7A4), (0xF900, 0xFFFE), (0x10000, 0x11000), (0x1D400, 0x1D800), (0x1F300, 0x1FB00)]
        start, stop = ranges[below(len(ranges))]
        return chr(start + below(stop - start))

    out = list(HAND_MADE)
    while len(out) < COUNT:
        length = 1 + below(12)
        kind = below(3)
        words = [PIECES[below(len(PIECES))] if kind else character() for _ in range(length)]
        out.append((" " if kind == 2 else "").join(words))
    return out
