"""A figure as PNG, for where SVG cannot go; drawn alike on every machine."""

from __future__ import annotations


def to_png(svg: str, zoom: float = 2.0) -> bytes:
    """The PNG of an SVG file, lettered with a font that is installed with this package.

    Args:
        svg: a file of its own, as `analysis.svg.standalone` makes it.
        zoom: pixels for each of its units.

    Raises:
        ValueError: it is no SVG.
    """
    import font_source_sans_pro
    import resvg_py

    family = "Source Sans Pro"
    # Fonts of the system differ, and a container has none: the text would be missing.
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
