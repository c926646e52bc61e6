/* Scales that are even to the eye and to colour-blind ones: mako (seaborn) for sizes, blue to orange for differences. */

const STOPS = {
  light: ["#f2f7ee", "#cdeacb", "#93d3b2", "#57b8ae", "#3a97a8", "#36749a", "#3c5089", "#3a2f5c", "#221731"],
  dark: ["#17181f", "#2b213b", "#3a3565", "#3b508c", "#36749a", "#3a97a8", "#57b8ae", "#93d3b2", "#e6f6e3"],
  lightBoth: ["#7a3100", "#b4540a", "#df8a3c", "#f3c797", "#f6f5f1", "#a9cbe6", "#5698cd", "#2068a8", "#0b3a6b"],
  darkBoth: ["#ffd9ae", "#f2a65a", "#b86a1e", "#5e3a1c", "#1b1c21", "#1c3d5c", "#2b6ba3", "#62a9e2", "#c6e4ff"],
};
const NOTHING = { light: "#d3d6d0", dark: "#3b4048" }; /* no colour of the scales: nothing passes, as where a causal model sees nothing */

const channels = (hex) => [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16));

/* 256 colours; the first is that of an exact zero, of differences where both are. */
function palette(theme, both) {
  const stops = STOPS[both ? `${theme}Both` : theme].map(channels);
  const colours = [];
  for (let i = 0; i < 256; i++) {
    const at = clamp((i - 1) / 254, 0, 1) * (stops.length - 1);
    const left = Math.min(Math.floor(at), stops.length - 2);
    colours.push(stops[left].map((value, c) => Math.round(value + (stops[left + 1][c] - value) * (at - left))));
  }
  colours[0] = channels(NOTHING[theme]);
  return {
    css: colours.map(([r, g, b]) => `rgb(${r} ${g} ${b})`),
    pixels: Uint32Array.from(colours, ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r),
    ink: colours.map(([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#101418" : "#f4f6f8")),
  };
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const printing = matchMedia("print");
let onPaper = printing.matches;

function currentTheme() {
  if (onPaper) return "light";
  return state.theme || (prefersDark.matches ? "dark" : "light");
}
