"""How the page looks, and the little that the browser does by itself."""

import gradio as gr


def theme() -> gr.themes.Base:
    """Colors and fonts; the fonts are those of the visitor's own system."""
    made = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
        radius_size="md",
    )
    return made.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_weight="600",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_300",
        input_background_fill="*background_fill_primary",
        button_large_radius="8px",
    )


CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container > main { padding: 1.25rem 1rem 2rem !important; }
#title h1 { font-size: 1.3rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#title p { margin: 0.1rem 0 0.25rem; color: var(--body-text-color-subdued); }
#controls, #results { background: var(--background-fill-primary); border: 1px solid var(--border-color-primary);
  border-radius: 12px; padding: 1.1rem; gap: 1rem; }
#controls .form, #controls .block, #results .block { overflow: visible; }
#controls .form { border: 0; background: none; gap: 1rem; box-shadow: none; }
#facts { margin-top: -0.75rem; font-size: 0.85rem; }
#facts, #facts * { color: var(--body-text-color-subdued); }
#facts, #status, #settings, #title, #advice, #command { padding: 0 !important; }
.tries { margin-top: -0.5rem; }
.tries .label { display: none; }
.tries .gallery { gap: 0.4rem; }
.tries .gallery-item { border-radius: 999px; padding: 0.15rem 0.7rem; min-height: 1.9rem; }
#new-seed { align-self: flex-end; height: 2.6rem; }
#status { min-height: 2.3rem; }
#status .said { margin: 0 0 0.35rem; font-variant-numeric: tabular-nums; }
#status .wrong { color: #b91c1c; white-space: pre-line; overflow-wrap: anywhere; }
.dark #status .wrong { color: #fca5a5; }
#status progress { display: block; width: 100%; height: 0.5rem; border: 0; border-radius: 999px; overflow: hidden;
  appearance: none; background: var(--border-color-primary); }
#status progress::-webkit-progress-bar { background: var(--border-color-primary); }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#controls input[role=listbox], #controls input[role=combobox] { text-overflow: ellipsis; padding-right: 2rem; }
#gallery, #gallery .gallery-container, #gallery .grid-wrap { height: auto !important; min-height: 0 !important;
  max-height: none !important; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(140px, 40%), 1fr)) !important;
  gap: 0.75rem; }
#legend { padding: 0 !important; }
#legend p { margin: 0; font-size: 0.85rem; color: var(--body-text-color-subdued); }
#legend .classes { display: flex; flex-wrap: wrap; gap: 0.3rem 0.9rem; max-height: 9rem; overflow: auto;
  margin-top: 0.35rem; color: var(--body-text-color); }
#legend .classes span { border-left: 1em solid; padding-left: 0.3em; }
#boxes th, #boxes td { font-family: var(--font); font-size: 0.8rem; }
/* The editors' tools lie on the picture where the page is narrow. */
#controls .toolbar-wrap { background: var(--background-fill-primary); border-radius: 8px; }
#drawn img { border: 1px solid var(--border-color-primary); }
#advice p { margin: 0; color: var(--body-text-color-subdued); font-size: 0.85rem; }
#gallery .empty { min-height: 18rem; flex-direction: column; gap: 0.5rem; }
#gallery .empty::after { content: "Pictures appear here"; color: var(--body-text-color-subdued); }
#gallery .thumbnail-lg { aspect-ratio: auto; display: flex; flex-direction: column; }
#gallery .thumbnail-lg img { aspect-ratio: 1; height: auto; }
#gallery .caption-label { position: static; max-width: 100%; width: 100%; border: 0; border-radius: 0; text-align: left;
  background: var(--background-fill-secondary); box-sizing: border-box; }
/* Small pictures are enlarged by whole pixels; what is downloaded is the picture itself. */
#gallery img { image-rendering: pixelated; }
#gallery.large img { image-rendering: auto; }
#settings dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 0; }
#settings dt { color: var(--body-text-color-subdued); }
#settings dd { margin: 0; overflow-wrap: anywhere; }
#command h2 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.4rem; }
#command pre { font-family: var(--font-mono); font-size: 0.85rem; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 0.6rem 0.8rem; margin: 0; }
#command .flag { white-space: nowrap; }
#copy { align-self: flex-start; flex: 0 0 auto; width: auto; min-width: 10rem; }
@media (max-width: 640px) { #controls, #results { padding: 0.9rem; } }
"""

ON_LOAD = """
() => {
  document.documentElement.lang = "en";
  document.querySelector("#status")?.setAttribute("aria-live", "polite");
}
"""

# The clipboard's interface is there on loopback and over https alone.
COPY = """
async () => {
  const button = document.querySelector("#copy"), code = document.querySelector("#command pre");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy command"; }, 1500);
}
"""
