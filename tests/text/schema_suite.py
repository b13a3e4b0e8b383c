"""JSON schemas of the public test suite beside what llguidance itself expects of them.

python -m tests.text.schema_suite SUITE EXPECTED, where SUITE is a checkout of json-schema-org/JSON-Schema-Test-Suite
and EXPECTED is json_schema_test_suite/expected_json_schema_test_suite.json of llguidance's repository. Exit status 1: a
case does worse than expected.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpillm.errors import RequestError
from mpillm.text import Tokenizer, load_tokenizer
from mpillm.text.constrain import Grammars, json_grammar
from tests.job_helpers import CHAT

# What may come of a case, from right to wrong, in llguidance's words.
OUTCOMES = (
    "pass", "false_negative", "compile_error_all_invalid", "skip_compile", "compile_error_valid", "false_positive",
)  # fmt: skip
UNKNOWN = ("Unimplemented keys", "not supported")  # words of errors about schemas that cannot be enforced


def cases(suite: Path, draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a draft by their names there, and their groups of cases."""
    folder = suite / "tests" / draft
    for path in (*sorted(folder.glob("*.json")), *sorted(folder.glob("optional/format/*.json"))):
        for group in json.loads(path.read_text()):
            yield path.relative_to(folder).with_suffix("").as_posix(), group


def outcome(tokenizer: Tokenizer, grammars: Grammars, group: dict[str, Any], case: dict[str, Any]) -> str:
    """What comes of a case."""
    try:
        matcher = grammars.matcher(json_grammar(group["schema"]))
    except RequestError as error:
        if any(words in str(error) for words in UNKNOWN):
            return "skip_compile"
        valid = any(case["valid"] for case in group["tests"])
        return "compile_error_valid" if valid else "compile_error_all_invalid"
    obeys = True
    text = json.dumps(case["data"], ensure_ascii=False, separators=(",", ":"))
    for token in tokenizer.encode(text, False):
        obeys = obeys and not matcher.ended and matcher.accepts(token)
        if obeys:
            matcher.push(token)
    obeys = obeys and (matcher.ended or any(map(matcher.accepts, tokenizer.end_ids)))
    if obeys == case["valid"]:
        return "pass"
    return "false_negative" if case["valid"] else "false_positive"


def main(suite: Path, expected: Path) -> int:
    tokenizer = load_tokenizer(CHAT)
    grammars = tokenizer.grammars(tokenizer.vocab_size, tokenizer.end_ids)
    worse = 0
    for draft, files in json.loads(expected.read_text()).items():
        ours: Counter[str] = Counter()
        theirs: Counter[str] = Counter()
        for file, group in cases(suite, draft):
            for case in group["tests"]:
                found = outcome(tokenizer, grammars, group, case)
                wanted = files.get(file, {}).get(group["description"], {}).get(case["description"])
                ours[found] += 1
                theirs[wanted or "unknown"] += 1
                if wanted is not None and OUTCOMES.index(found) > OUTCOMES.index(wanted):
                    worse += 1
                    print(f"{file} / {group['description']} / {case['description']}: {wanted} -> {found}")
        print(f"{draft}: {ours.total()} cases")
        for name in (*OUTCOMES, "unknown"):
            print(f"  {name:26} {ours[name]:5} expected {theirs[name]:5}")
    return worse > 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
