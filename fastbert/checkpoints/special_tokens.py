"""The special and added tokens that a checkpoint folder's files name, read and registered as transformers 5 does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from fastbert.checkpoints import files
from fastbert.checkpoints.fields import Fields
from fastbert.errors import CheckpointError

Token = str | AddedToken

# What BERT's tokenizer calls its special tokens unless a file says otherwise.
BERT_NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# In the order in which those that a vocabulary lacks get their ids.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_Several = list[Token] | dict[str, Token | None]

_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"  # since transformers 5, and before
_MOST_ID = 2**31 - 1
_SHOWN = 5  # disagreements in a message


class SpecialTokens:
    """The special and added tokens of a folder.

    Attributes:
        named: tokens by their role, as "mask_token"; None where a file says that there is none.
        extra: special tokens without a role.
        added: tokens by the id that a file gives them.

    Args:
        folder: where special_tokens_map.json, added_tokens.json and tokenizer.json may be.
        config: of its tokenizer_config.json.

    Raises:
        CheckpointError: a field is not what it must be.
    """

    def __init__(self, folder: Path, config: Fields) -> None:
        self.named: dict[str, Token | None] = {}
        self.extra: list[Token] = []
        self.added: dict[int, AddedToken] = {}
        self._table = table = read_fields(folder / "special_tokens_map.json")
        legacy = read_fields(folder / "added_tokens.json")
        self._promised = {text: legacy.whole(text, 0, least=0, most=_MOST_ID) for text in legacy.values}

        self._take_named(config, special=False)
        lists = {name: _several(config, name, special=False) for name in (_EXTRA, _OLD_EXTRA) if name in config.values}
        if not lists.get(_EXTRA) and _OLD_EXTRA in lists:
            lists[_EXTRA] = lists.pop(_OLD_EXTRA)
        self._take_roles(lists)
        if config.given("added_tokens_decoder"):  # then transformers reads no older file
            decoder = Fields(f"{config.source}: added_tokens_decoder", config.mapping("added_tokens_decoder"))
            self.added = {_id(decoder, key): _added_token(decoder, key, special=False) for key in decoder.values}
        else:
            self._take_named(table, special=True)
            self._take_lists(table, lists)
            named = {text_of(token) for token in [*self.named.values(), *lists.get(_EXTRA, [])] if token is not None}
            for text, number in self._promised.items():
                self.added[number] = AddedToken(text, normalized=text not in named, special=text in named)
            if files.has(folder / "tokenizer.json"):
                self._take_added(read_fields(folder / "tokenizer.json"))
        self.extra = list(lists[_EXTRA] if _EXTRA in lists else lists.get(_OLD_EXTRA, []))

    def _take_named(self, fields: Fields, special: bool) -> None:
        for name, value in fields.values.items():
            if name in ROLES or (name.endswith("_token") and isinstance(value, (str, dict))):
                self.named[name] = _token(fields, name, special)

    def _take_lists(self, table: Fields, lists: dict[str, _Several]) -> None:
        """Those of special_tokens_map.json, beside or in the place of those of tokenizer_config.json."""
        if _OLD_EXTRA in table.values:
            lists[_OLD_EXTRA] = _several(table, _OLD_EXTRA, special=True)
        if _EXTRA in table.values:
            found = _several(table, _EXTRA, special=True)
            before = lists.get(_EXTRA, [])
            if isinstance(found, list):
                found = [*before, *(token for token in found if token not in before)]
            lists[_EXTRA] = found
        self._take_roles(lists)

    def _take_roles(self, lists: dict[str, _Several]) -> None:
        """Move tokens that come by roles of the model's own to the others that have one."""
        for name, several in list(lists.items()):
            if isinstance(several, dict):
                self.named |= several
                del lists[name]

    def _take_added(self, tokenizer_json: Fields) -> None:
        listed = tokenizer_json.values.get("added_tokens")
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise tokenizer_json.error("added_tokens", "a list of objects")
        for i, item in enumerate(listed):
            number = Fields(f"{tokenizer_json.source}: added_tokens[{i}]", item).whole("id", -1, least=0, most=_MOST_ID)
            self.added[number] = _added_token(
                Fields(tokenizer_json.source, {f"added_tokens[{i}]": item}), f"added_tokens[{i}]", special=False
            )

    def names(self) -> dict[str, str]:
        """What the tokens are called, by role."""
        return {role: text_of(token) for role, token in self.named.items() if token is not None}

    def spellings(self) -> tuple[str, ...]:
        """Every special token, once."""
        return tuple(dict.fromkeys([*self.names().values(), *map(text_of, self.extra)]))

    def add_to(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Register every token; those that the vocabulary lacks get the ids after it, in the order of their ids here.

        Raises:
            CheckpointError: the library refuses one.
        """
        tokens: list[Token] = [self.added[number] for number in sorted(self.added)]
        present = {token.content for token in [*tokenizer.get_added_tokens_decoder().values(), *self.added.values()]}
        ordered = sorted(self.named, key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
        for token in [*(self.named[role] for role in ordered), *self.extra]:
            if token is not None and text_of(token) not in present and token not in tokens:
                tokens.append(token)
        roles = set(self.names().values())
        with library_errors("tokenizer_config.json", "tokens that `tokenizers` can add"):
            tokenizer.add_tokens([_registered(token, roles) for token in tokens])

    def disagreements(self, tokenizer: tokenizers.Tokenizer) -> list[str]:
        """What a file says of a token's id or name that did not come about."""
        promised = {**self._promised, **{token.content: number for number, token in self.added.items()}}
        wrong = [
            f"id {number} of {text!r}, whose id is {tokenizer.token_to_id(text)}"
            for text, number in promised.items()
            if text and tokenizer.token_to_id(text) != number
        ]
        for role, name in self.names().items():
            if role in self._table.values and (told := _token(self._table, role, special=True)) is not None:
                wrong += [f"special_tokens_map.json: {role} {text_of(told)!r}"] * (text_of(told) != name)
        return wrong if len(wrong) <= _SHOWN else [*wrong[:_SHOWN], f"and {len(wrong) - _SHOWN} more of that kind"]


@contextmanager
def library_errors(source: str, expected: str) -> Iterator[None]:
    """What `tokenizers` raises within the block becomes a CheckpointError of this source."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception, and a panic of its Rust code is no Exception at all.
        known = type(error) in (Exception, ValueError, TypeError) or type(error).__name__ == "PanicException"
        if not known:
            raise
        raise CheckpointError(source, str(error), expected) from error


def read_fields(path: Path) -> Fields:
    """The fields of a JSON file; none where there is no file."""
    return Fields(str(path), files.read_json(path) if files.has(path) else {})


def text_of(token: Token) -> str:
    """How the token is spelled."""
    return token if isinstance(token, str) else token.content


def _token(fields: Fields, name: str, special: bool) -> Token | None:
    """A token as a string, or as an object with properties; None for null."""
    value = fields.values[name]
    return value if value is None or isinstance(value, str) else _added_token(fields, name, special)


def _several(fields: Fields, name: str, special: bool) -> _Several:
    """A list of tokens, or an object of tokens by their role; null is an empty list."""
    value = fields.values[name]
    if isinstance(value, dict):
        roles = Fields(f"{fields.source}: {name}", value)
        return {role: _token(roles, role, special) for role in value}
    if value is not None and not isinstance(value, list):
        raise fields.error(name, "a list of tokens")
    items = Fields(f"{fields.source}: {name}", {f"[{i}]": item for i, item in enumerate(value or [])})
    return [token for i in items.values if (token := _token(items, i, special)) is not None]


def _added_token(fields: Fields, name: str, special: bool) -> AddedToken:
    value = fields.values[name]
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise fields.error(name, 'a token: a string, or an object as {"content": "[CLS]", "special": true}')
    token = Fields(f"{fields.source}: {name}", value)
    special = special or token.flag("special", False)
    return AddedToken(
        value["content"],
        single_word=token.flag("single_word", False),
        lstrip=token.flag("lstrip", False),
        rstrip=token.flag("rstrip", False),
        normalized=token.flag("normalized", not special),
        special=special,
    )


def _id(fields: Fields, key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) <= _MOST_ID):
        raise CheckpointError(fields.source, f"{key!r:.80}", "the id of a token, a whole number")
    return int(key)


def _registered(token: Token, roles: set[str]) -> AddedToken:
    """The token as it is added: special where it came as a string, or has a role."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = token.special or token.content in roles
    return token
