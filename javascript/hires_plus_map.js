// The text of a painted map, as lib_hires/painted_map.py reads and writes it. A map is {width, height, levels}, with
// levels 0 (black) to 15 (white) in rows from the top.
window.hiresPlusMap = (function() {
    const LONGEST_SIDE = 64;
    const WHITE = 15;
    const FORM = /^(\d{1,2})x(\d{1,2})\.([A-Za-z0-9_-]+)$/;

    async function piped(bytes, stream) {
        return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());
    }

    // two levels to a byte, the left one in the high half
    function packed(levels) {
        const bytes = new Uint8Array(Math.ceil(levels.length / 2));
        levels.forEach((level, cell) => bytes[cell >> 1] |= cell % 2 ? level : level << 4);
        return bytes;
    }

    function unpacked(bytes, count) {
        return Uint8Array.from({length: count}, (_, cell) => cell % 2 ? bytes[cell >> 1] & WHITE : bytes[cell >> 1] >> 4);
    }

    function toBase64(bytes) {
        return btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
    }

    function fromBase64(text) {
        return Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), letter => letter.charCodeAt(0));
    }

    async function encode(map) {
        const deflated = await piped(packed(map.levels), new CompressionStream("deflate"));
        return `${map.width}x${map.height}.${toBase64(deflated)}`;
    }

    // rejects where the text is no map
    async function decode(text) {
        const [, columns, rows, data] = FORM.exec(text.trim());
        const [width, height] = [Number(columns), Number(rows)];
        const bytes = await piped(fromBase64(data), new DecompressionStream("deflate"));
        const sized = [width, height].every(side => side >= 1 && side <= LONGEST_SIDE);
        if (!sized || bytes.length !== Math.ceil(width * height / 2)) throw new Error("not a map of its size");
        return {width, height, levels: unpacked(bytes, width * height)};
    }

    // the sides of a picture with the longer one as long as a map's; not rounded
    function scaled(width, height) {
        const scale = LONGEST_SIDE / Math.max(width, height);
        return [width * scale, height * scale];
    }

    function filled(width, height, level) {
        return {width, height, levels: new Uint8Array(width * height).fill(level)};
    }

    // a map for a picture of this size, of one level
    function plain(width, height, level = 0) {
        const [columns, rows] = scaled(width, height).map(side => Math.max(1, Math.round(side)));
        return filled(columns, rows, level);
    }

    // a picture's grey; what is transparent counts as black
    function ofPicture(picture) {
        const map = plain(picture.width, picture.height);
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [map.width, map.height];
        const context = canvas.getContext("2d");
        context.fillRect(0, 0, map.width, map.height);
        context.imageSmoothingQuality = "high";
        context.drawImage(picture, 0, 0, map.width, map.height);
        const {data} = context.getImageData(0, 0, map.width, map.height);
        map.levels.forEach((_, cell) => {
            const [red, green, blue] = data.subarray(4 * cell, 4 * cell + 3);
            map.levels[cell] = Math.round((0.299 * red + 0.587 * green + 0.114 * blue) * WHITE / 255);
        });
        return map;
    }

    return {WHITE, encode, decode, scaled, filled, plain, ofPicture};
})();
