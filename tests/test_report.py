"""Pages that need no other file and no script, and read well on a telephone."""

import re

from PIL import Image

from convfusion import demo, report

RESULTS = {
    "removed": {"epsilon_error": 0.4, "image_psnr": 11.0, "image_psnr_error": 0.5},
    "distilled": {
        "epsilon_error": 0.02,
        "initial_error": 0.39,
        "image_psnr": 21.0,
        "image_psnr_error": 0.4,
        "steps": 400,
        "seconds": 90.0,
    },
    "shipped": {"epsilon_error": 0.01, "image_psnr": None, "image_psnr_error": None},
    "sites": 7,
    "flops_ratio": 6.0,
    "parameters": {"before": 2000, "after": 1000},
    "guidance": 3.0,
    "image_steps": 25,
    "teacher_sha256": "0" * 64,
}


def test_a_picture_is_seen_in_full_size_without_a_script():
    shown = report.show_picture(Image.new("RGB", (900, 300)), 'a "grid" <of pictures>')
    assert "--width: 900px" in shown
    assert '<input type="checkbox"' in shown and shown.index("<input") < shown.index("<img")
    assert 'alt="a &quot;grid&quot; &lt;of pictures&gt;"' in shown
    page = report.fill_page("a & b", shown)
    assert "<title>a &amp; b</title>" in page
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)


def test_cells_of_numbers_do_not_break():
    page = report.fill_page("", report.show_table(("", "x"), [("a", "1 ± 2")], grey=[True]))
    assert "td { white-space: nowrap; }" in page
    assert '<div class="scroll"><table' in page
    assert "<tr class=grey><td>a</td><td>1 ± 2</td></tr>" in page


def test_the_demo_says_first_what_it_shows():
    page = demo.render_page(
        RESULTS, Image.new("RGB", (900, 300)), [{"output": 1.0}, {"output": 0.1}]
    )
    verdict = page.index("Rows 1, 3 and 4 should look alike")
    assert page.index("<h1>") < verdict < page.index("<img")
    assert "distilled just now are 20× nearer" in demo.give_verdict(RESULTS)
    short = RESULTS | {"distilled": RESULTS["distilled"] | {"epsilon_error": 0.3, "steps": 2}}
    assert "2 steps were too few" in demo.give_verdict(short)
