"""Pages that need no other file and no script, and read well on a telephone."""

import re

from PIL import Image

from convfusion import report


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


def test_a_grid_goes_on_below_after_so_many_columns():
    colours = ("red", "green", "blue", "black", "orange")
    rows = {"a": [Image.new("RGB", (128, 128), name) for name in colours], "b": []}
    rows["b"] = list(reversed(rows["a"]))
    whole = report.draw_grid(rows, colours)
    folded = report.draw_grid(rows, colours, 3)
    two = {name: images[3:] for name, images in rows.items()}
    below = report.draw_grid(two, colours[3:])
    first = {name: images[:3] for name, images in rows.items()}
    assert folded.width == report.draw_grid(first, colours[:3]).width < whole.width
    place = (0, folded.height - below.height, below.width, folded.height)
    assert folded.crop(place).tobytes() == below.tobytes()
    assert report.draw_grid(rows, colours, 5).tobytes() == whole.tobytes()


def test_a_note_stands_once_and_a_delta_is_drawn():
    image = Image.new("RGB", (128, 128))
    plain = report.draw_grid({"a": [image] * 2}, ["x", "y"], 1)
    noted = report.draw_grid({"a": [image] * 2}, ["x", "y"], 1, {"a": "1 dB"})
    half = plain.height // 2
    below = (0, half, plain.width, plain.height)
    assert noted.size == plain.size and noted.tobytes() != plain.tobytes()
    assert noted.crop(below).tobytes() == plain.crop(below).tobytes()
    delta, without = (report.draw_grid({name: [image]}, ["x"]) for name in ("ΔA", "A"))
    assert delta.crop((2, 0, 20, 34)).getextrema()[0][0] < 100
    assert delta.crop((2, 0, 128, 34)).tobytes() != without.crop((2, 0, 128, 34)).tobytes()
