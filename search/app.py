"""The page of `search.py serve`: drop a file or draw, see what is like it, turn a shape around. On 127.0.0.1 alone."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from search.answers import FIELDS, made_by, search, table
from search.files import view_of
from search.index import Index, identity, told
from search.model import Model
from utils.errors import UserError
from utils.evaluation.metrics import RANKINGS
from utils.modalities import MODALITIES

SHOWN = 20  # results
refusal = partial(gr.Error, print_exception=False)  # a message on the page
HINT = "Choose the brush on the left, then draw"
BRUSH = gr.Brush(default_size=16, colors=["#000000"], color_mode="fixed")
PAD = {"canvas_size": (320, 320), "fixed_canvas": True, "brush": BRUSH, "transforms": (), "layers": False, "placeholder": HINT}


def launch(app: gr.Blocks, port: int, **options: Any) -> None:
    """Open the page and answer until interrupted; `options` go to Gradio. The page asks nobody for fonts."""
    theme = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    try:
        app.launch(server_name="127.0.0.1", server_port=port, share=False, max_file_size="50mb", theme=theme, **options)
    except OSError as error:
        raise UserError(f"no page on port {port} ({error}): end what uses the port, or give another with --port") from error


class Page:
    """What the page does; drawings and 3D views go through a folder of its own."""

    def __init__(self, index: Index, model: Model, folder: Path) -> None:
        self.index, self.model, self.folder = index, model, folder
        self.drawable = next((name for name in model.encoders if MODALITIES[name].is_2d), None)

    def find(self, path: str | None, ranking: str, modality: str | None = None) -> tuple[str, list, list, list]:
        """Return for one file the verdict, the gallery's pictures with captions, the rows of the table, and the plain results."""
        if not path:
            raise refusal("drop a file first")
        try:
            with told(self.index.place):
                (answer,) = search(self.index, self.model, [path], SHOWN, ranking, modality)
        except UserError as error:
            raise refusal(str(error).replace(path, Path(path).name)) from error
        captions = [f"{row['rank']}. {row['score']:.3f}" for row in answer["results"]]
        pictures = [Image.open(io.BytesIO(png)) for png in answer["pictures"][1:]]
        return answer["verdict"], list(zip(pictures, captions)), table(answer), answer["results"]

    def find_drawing(self, sketch: dict[str, Any] | None, ranking: str) -> tuple[str, list, list, list]:
        """As `find`, for what is on the sketch pad."""
        ink = np.max([layer[:, :, 3] for layer in sketch["layers"]], axis=0) if sketch and sketch["layers"] else np.zeros((1, 1))
        if not ink.any():
            raise refusal("draw something first")
        meaning = self.index.info["calibration"][self.drawable]
        drawn_picture(ink, meaning["ground"], meaning["fill"]).save(path := f"{self.folder}/drawing.png")
        return self.find(path, ranking, self.drawable)

    def view(self, results: list[dict], event: gr.SelectData) -> str | None:
        """Return the GLB of the chosen result; None for pictures, and for whatever is no item: nothing else is ever opened."""
        path = results[event.index]["path"]
        if MODALITIES[self.index.info["modality"]].is_2d or not self.index.pick([identity(path)]):
            return None
        target = self.folder / f"{identity(path)}.glb"
        try:
            target.write_bytes(view_of(path, self.index.info["up"]))
        except (UserError, OSError, ValueError) as error:
            raise refusal(f"no 3D view of {path}: {error}") from error
        return str(target)


def make_app(page: Page) -> gr.Blocks:
    """Return the layout."""
    index = page.index
    with gr.Blocks(title="Search", analytics_enabled=False) as app:
        gr.Markdown(f"## {len(index)} items ({index.info['modality']}), compared by {index.info['representation']}{made_by(index.info)}")
        with gr.Row():
            with gr.Column():
                ranking = gr.Radio(list(RANKINGS), value="plain", label="Ranking", visible=index.info["graph"])
                with gr.Tab("Draw", visible=page.drawable is not None):
                    sketch = gr.Sketchpad(type="numpy", label="Sketch", **PAD)
                    draw = gr.Button("Find what is drawn", variant="primary")
                with gr.Tab("File"):
                    file = gr.File(type="filepath", label="A picture or a shape")
                    ask = gr.Button("Find what is like it", variant="primary")
                view = gr.Model3D(label="The chosen result", height=300)
            with gr.Column(scale=2):
                said = gr.Markdown()
                gallery = gr.Gallery(columns=5, label="Results", allow_preview=False, object_fit="contain")
                scores = gr.Dataframe(headers=list(FIELDS), label="Scores", interactive=False, wrap=True)
        results = gr.JSON(visible=False)
        ask.click(page.find, [file, ranking], [said, gallery, scores, results], api_name="search")
        draw.click(page.find_drawing, [sketch, ranking], [said, gallery, scores, results], api_visibility="private")
        gallery.select(page.view, results, view, api_visibility="private")
    return app


def drawn_picture(ink: np.ndarray, ground: float, fill: float) -> Image.Image:
    """Return what is drawn, (H, W) opacity 0..255, as the model's training pictures look: on their ground 0..255, in the opposite tone,
    its longer extent the share `fill` of the side.
    """
    drawing = Image.fromarray(ink.astype(np.uint8))
    drawing = drawing.crop(drawing.getbbox())
    side = max(round(max(drawing.size) / fill), *drawing.size)
    picture = Image.new("L", (side, side), round(ground))
    picture.paste(0 if ground > 127 else 255, ((side - drawing.width) // 2, (side - drawing.height) // 2), drawing)
    return picture
