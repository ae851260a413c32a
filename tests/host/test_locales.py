"""Every node, input, output and tooltip in six languages, as the host serves them and as they fit the schemas."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from comfy_server import Server
from english import FILE, LANGUAGES, LOCALES, Texts, drift, flat, from_schemas, stored

OTHERS = [language for language in LANGUAGES if language != "en"]
#: Types and the guidance scale keep their names in every language, as they do in the host.
PROPER = re.compile(r"[A-Z]+|cfg")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
#: Words of a tooltip that are typed or chosen as they stand, and so are not translated.
VERBATIM = re.compile(
    r"\b(auto|quasi-newton|parataa|picard|sequential(?= is)|collocation|fast|balanced|strict|exact|custom|sketch"
    r"|standard|fine|enable|disable|dpm_adaptive|safetensors|JSON|PSNR|VRAM|GPU|LATENT|IMAGE"
    r"|SAMPLER|SamplerCustom|ComfyUI|dB)\b"
)
#: A script of its own, or letters that English does not have.
SCRIPT = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7a3]"}


@pytest.fixture(scope="module")
def english():
    return from_schemas()


def texts(language: str) -> Texts:
    return dict(flat(stored(language)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_or_stale(english, language):
    """On a failure: ``python tests/host/english.py --write``, then translate what it lists."""
    assert drift(language, english) == []


def test_every_text_is_there(english):
    for path, text in flat(english):
        assert isinstance(text, str) and text.strip(), path


@pytest.mark.parametrize("language", OTHERS)
def test_numbers_and_fixed_words_are_kept(language):
    here = texts(language)
    for path, text in texts("en").items():
        assert Counter(NUMBER.findall(here[path])) == Counter(NUMBER.findall(text)), (path, here[path])
        for word in VERBATIM.findall(text):
            assert word in here[path], (path, word, here[path])


@pytest.mark.parametrize("language", OTHERS)
def test_nothing_is_left_in_english(language):
    here = texts(language)
    for path, text in texts("en").items():
        if PROPER.fullmatch(text):
            assert here[path] == text, path
        elif path[-1] in ("tooltip", "description"):
            assert here[path] != text, path
            if language in SCRIPT:
                assert re.search(SCRIPT[language], here[path]), (path, here[path])


@pytest.mark.parametrize("language", OTHERS)
def test_one_english_text_has_one_translation(language):
    """The same tooltip on two nodes reads alike in every language, and two inputs of a node never share a name."""
    here, seen = texts(language), {}
    for path, text in texts("en").items():
        assert seen.setdefault((path[-1], text), here[path]) == here[path], path
    for node, entry in stored(language).items():
        names = [i["name"] for i in entry["inputs"].values()]
        assert len(set(names)) == len(names), node


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_survive_the_frontends_message_format(language):
    """There braces, bars and at-signs are syntax, not letters; and none of the texts is markup."""
    for path, text in texts(language).items():
        assert not re.search(r"[{}|@<>]", text), (path, text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_files_are_written_alike(language):
    raw = (LOCALES / language / FILE).read_text(encoding="utf-8")
    assert raw == json.dumps(json.loads(raw), indent=2, ensure_ascii=False) + "\n"


def test_the_host_serves_them(tmp_path):
    server = Server(tmp_path)
    server.start()
    try:
        served = server.get("/i18n")
    finally:
        server.stop()
    for language in LANGUAGES:
        assert served[language]["nodeDefs"] == stored(language)
