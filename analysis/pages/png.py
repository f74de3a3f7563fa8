"""Render figures as PNG, with the same pixels on every machine."""

from __future__ import annotations


def to_png(svg: str, zoom: float = 2.0) -> bytes:
    """Render an SVG file as PNG, using a font that is installed as a dependency.

    Args:
        svg: A standalone SVG file, as returned by `analysis.pages.svg.standalone`.
        zoom: Pixels per SVG unit.

    Returns:
        The PNG file's bytes.

    Raises:
        ValueError: If `svg` is not valid SVG.
    """
    import font_source_sans_pro
    import resvg_py

    family = "Source Sans Pro"
    # System fonts differ between machines. In a container without fonts, no text would be drawn.
    lettered = svg.replace("system-ui", f'"{family}"')
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=lettered,
            zoom=zoom,
            background="#ffffff",
            skip_system_fonts=True,
            font_files=[font_source_sans_pro.SourceSansPro],
            font_family=family,
        )
    )
