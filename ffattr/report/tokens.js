/* Tokens as tokenizers write them, and as text. */

const SPACE = { "Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t", "č": "" };

/* Byte-level tokenizers write each byte as one character: those that can be printed as themselves, others from U+0100. */
const BYTES = (() => {
  const bytes = new Map();
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    bytes.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return bytes;
})();

function fromBytes(token) {
  const bytes = Array.from(token, (character) => BYTES.get(character));
  if (bytes.includes(undefined)) return null;
  const text = new TextDecoder().decode(Uint8Array.from(bytes));
  return text.includes("\ufffd") ? null : text;
}

/* How the tokens of a sequence mark words: "bytes" and "marks" where a word begins, "ends" where it ends, "pieces" with
   ## where it goes on, "words" not at all. */
function styleOf(tokens) {
  const some = (test) => tokens.some(test);
  if (some((token) => /^[ĠĊ]/.test(token))) return "bytes";
  if (some((token) => token.includes("▁"))) return "marks";
  if (some((token) => token.endsWith("</w>"))) return "ends";
  return some((token) => /^##./.test(token)) ? "pieces" : "words";
}

/* The text of each token, with the spaces and line ends before it. */
function textOf(tokens) {
  const style = styleOf(tokens);
  let open = true; /* no space is wanted next */
  return tokens.map((token, place) => {
    if (style === "bytes") return fromBytes(token) ?? token.replace(/[ĠĊĉč]/g, (mark) => SPACE[mark]);
    if (style === "marks") return token === "<0x0A>" ? "\n" : token.replaceAll("▁", " ");
    const goesOn = style === "pieces" && /^##./.test(token);
    const before = style === "ends" ? tokens[place - 1]?.endsWith("</w>") === false : goesOn;
    const closes = /^[.,;:!?%)\]}’'”…]+$|^['’](s|t|re|ve|ll|d|m)$/i.test(token.replace("</w>", ""));
    const text = goesOn ? token.slice(2) : style === "ends" ? token.replace("</w>", "") : token;
    const space = open || before || closes ? "" : " ";
    open = /[([{“‘]$/.test(token);
    return space + text;
  });
}

/* Short, on one line, for axes and lists. */
function labelOf(text, token) {
  const label = text.trim() || text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || token;
  return label.replace(/\s+/g, " ");
}

const described = new Map();
/* Texts and labels of the tokens of an axis of a panel. */
function axis(of, name) {
  const key = `${PANELS.indexOf(of)}.${name}`;
  if (!described.has(key)) {
    const tokens = of[name];
    const texts = textOf(tokens);
    const positions = of[name === "keys" ? "keyPositions" : "queryPositions"];
    const labels = texts.map((text, place) => labelOf(text, tokens[place]));
    described.set(key, { tokens, texts, labels, positions, placeOf: new Map(positions.map((position, place) => [position, place])) });
  }
  return described.get(key);
}
const rowsAxis = () => axis(panel(), "queries");
const columnsAxis = () => axis(panel(), "keys");

/* The column of a row's own token, and the row of a column's; NONE in maps between two texts. */
const columnOfRow = (row) => (panel().same ? columnsAxis().placeOf.get(rowsAxis().positions[row]) ?? NONE : NONE);
const rowOfColumn = (column) => (panel().same ? rowsAxis().placeOf.get(columnsAxis().positions[column]) ?? NONE : NONE);
