#!/usr/bin/env bash
# tokenizers 0.23.3: with byte fallback, one bad byte takes the good characters of its run with it: the bytes of a euro sign decode
# to it, and with one byte more to four U+FFFD. So text that a stream has already given out is taken back, and `DecodeStream`,
# which is made for streaming, raises on such ids.
#
# Seen on 2026-11-29:
#   as found: '€', and with a bad byte behind it '����'
#   as found: DecodeStream gives the character out, then raises: [None, None, '€', None, 'Exception']
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare tokenizers==0.23.3 -- "$@"
run_python <<'PY'
from finding import expect
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"a": 257}
tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
euro, bad, letter = [1 + byte for byte in "€".encode()], 256, 257
good, spoilt = tokenizer.decode(euro), tokenizer.decode([*euro, bad])
expect((good, spoilt) == ("€", "\ufffd" * 4), f"{good!r}, and with a bad byte behind it {spoilt!r}")
stream, given = DecodeStream(), []
try:
    for token in (*euro, bad, letter):
        given.append(stream.step(tokenizer, token))
except Exception as error:
    given.append(type(error).__name__)
expect(given == [None, None, "€", None, "Exception"], f"DecodeStream gives the character out, then raises: {given}")
PY
