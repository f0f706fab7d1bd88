"""How the page looks, and the little that the browser does by itself."""

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#title p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
#new-seed { align-self: flex-end; }
#status { min-height: 2.6rem; }
#status .said { margin: 0 0 0.35rem; font-variant-numeric: tabular-nums; }
#status .wrong { color: var(--error-text-color); white-space: pre-line; overflow-wrap: anywhere; }
#status progress { display: block; width: 100%; height: 0.5rem; accent-color: var(--color-accent); }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(132px, 40%), 1fr)) !important; }
/* Small pictures are enlarged by whole pixels; what is downloaded is the picture itself. */
#gallery img { image-rendering: pixelated; }
#gallery.large img { image-rendering: auto; }
#settings dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 0; }
#settings dt { color: var(--body-text-color-subdued); }
#settings dd { margin: 0; overflow-wrap: anywhere; }
#command textarea { font-family: var(--font-mono); font-size: 0.85rem; }
#empty { color: var(--body-text-color-subdued); text-align: center; padding: 3rem 1rem; }
"""

ON_LOAD = """
() => {
  document.documentElement.lang = "en";
  document.querySelector("#status")?.setAttribute("aria-live", "polite");
}
"""

# The clipboard's interface is there on loopback and over https alone.
COPY = """
async (text) => {
  const button = document.querySelector("#copy");
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.querySelector("#command textarea");
    area.select();
    document.execCommand("copy");
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}
"""
