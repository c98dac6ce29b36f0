import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from scalesweep_hf import cli

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(trained_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    arguments = ["--output", str(file), "--rows", "2", "--length", "64", "--device-map", "cpu"]
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(trained_model), *arguments])
    assert end.value.code == 0
    return file


def test_the_file_stands_alone(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!#)", text.replace("xlink:href", ""))
    assert not re.findall(r"url\((?!#)", text)
    assert text.count("<svg") == 2 + 5 + 2 + 1
    assert "prefers" in text or "color-scheme: light dark" in text
    assert not list(page.parent.glob("*.part"))


def test_every_tensor_has_a_row(page: Path) -> None:
    body = page.read_text().partition("<tbody>")[2].partition("</tbody>")[0]
    kinds = re.findall(r"<td>(weights|activations|keys|values|queries)</td>", body)
    assert kinds.count("weights") == 4 * 7 * 2
    assert kinds.count("keys") == 4 * 2


def test_a_name_is_escaped(tmp_path: Path) -> None:
    from scalesweep_hf.evaluate.gaps import Gap
    from scalesweep_hf.evaluate.report import COLOURS, write_report

    gaps = [
        Gap("<b>", "weights", error, dict.fromkeys(COLOURS, 0.1), {0: 3}, 0.0)
        for error in ("mse", "wmse")
    ]
    size = {"before": 2, "after": 1, "quantized": 1}
    write_report(
        tmp_path / "r.html", about={"model": "<i>"}, gaps=gaps, sensitivity={"<b>": 0.1}, size=size
    )
    text = (tmp_path / "r.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;" in text


def test_json_has_the_numbers(
    trained_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("the cat ran to the dog\n" * 50)
    arguments = ["--output", str(tmp_path / "r.html"), "--rows", "1", "--length", "32", "--json"]
    text = ["--text", str(tmp_path / "t.txt")]
    with pytest.raises(SystemExit):
        cli.main(["report", str(trained_model), *arguments, *text])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"gaps", "sensitivity", "bytes"}
    assert len(found["sensitivity"]) == 28
    assert found["bytes"]["after"] < found["bytes"]["before"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here")
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_browser_shows_pictures_and_text(mode: str, page: Path, tmp_path: Path) -> None:
    from matplotlib import image

    assert CHROMIUM is not None
    shot = tmp_path / "shot.png"
    dark = ["--force-dark-mode", "--enable-features=WebContentsForceDark"] if mode == "dark" else []
    subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            *dark,
            "--window-size=1000,3000",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    pixels = image.imread(shot)[..., :3]
    background = pixels[5, 5]
    assert (background.mean() < 0.3) == (mode == "dark")
    for top in range(0, 2400, 400):  # something in every stretch of the page
        part = pixels[top : top + 400]
        assert (abs(part - background).max(axis=-1) > 0.2).mean() > 0.005
