// A small canvas under the text box of a painted map. The text box stays the value of record: the canvas writes into it
// and follows it, whoever changes it (paste, preset, reset).
(function() {
    const SHADES = [[0, "black"], [4, "dark grey"], [8, "mid grey"], [11, "light grey"], [15, "white"]];
    const SCALE = 5; // canvas pixels in the 64th part of the longer side
    const FOLLOW_EVERY = 200; // milliseconds; gradio sets a value without any event
    const MOST_STEPS_BACK = 50;

    const page = () => typeof gradioApp === "function" ? gradioApp() : document;

    function make(tag, properties = {}, ...children) {
        const element = Object.assign(document.createElement(tag), properties);
        element.append(...children);
        return element;
    }

    function button(words, help, onclick) {
        const made = make("button", {type: "button", className: "hires-plus-tool", title: help, onclick}, words);
        made.setAttribute("aria-label", help);
        return made;
    }

    // the host's tab that a component of ours is in, as its ids begin; the bench page has one tab and no name for it
    function tabOf(block) {
        const tab = /^script_(txt2img|img2img)_/.exec(block.id);
        return tab ? `${tab[1]}_` : "";
    }

    function sideOf(tab, side) {
        return Number(page().querySelector(`#${tab}${side} input[type=number]`)?.value) || 512;
    }

    // the picture that the tab's gallery shows large, or its first one
    function galleryPicture(tab) {
        const gallery = page().querySelector(`#${tab}gallery`);
        const shown = gallery?.querySelector(".preview > img, .preview .media-button img, [data-testid=detailed-image]");
        return shown ?? gallery?.querySelector("img");
    }

    class Painting {
        constructor(block) {
            this.block = block;
            this.tab = tabOf(block);
            this.past = []; // the texts before this one
            this.level = hiresPlusMap.WHITE;
            this.backdrop = null;
            this.pointer = null; // where a stroke is, while there is one
            this.turn = 0; // the newest change; older ones that are still being packed or unpacked come too late
            this.build();
            this.load(this.input.value);
        }

        get input() {
            return this.block.querySelector("[data-testid=textbox]");
        }

        // -- the value

        follow() {
            this.block.closest(".hires-plus-row").classList.toggle("hires-plus-away", !this.isUsed());
            if (this.pointer) return;
            if (this.input.value !== this.text) {
                this.remember();
                this.load(this.input.value);
            } else if (this.shape().join() !== this.drawnShape) {
                if (!this.text) this.map = this.blank();
                this.draw();
            }
        }

        // whether the field that this map belongs to has the choice that makes use of it
        isUsed() {
            const prefix = "hires-plus-with-";
            const words = Array.from(this.block.classList).filter(name => name.startsWith(prefix));
            if (words.length !== 2) return true;
            const [field, choice] = words.map(name => name.slice(prefix.length));
            const section = this.block.closest(".hires-plus-row").parentElement;
            const list = section.querySelector(`[id$="_${field}"] input`);
            if (!list) return true;
            // while a list is open its box has what is typed to search it
            if (list !== document.activeElement || list.value === choice) this.used = list.value === choice;
            return this.used ?? false;
        }

        async load(text) {
            const turn = ++this.turn;
            this.text = text;
            let map = this.blank();
            let words = "Paint here, or upload a picture.";
            if (text) {
                try {
                    map = await hiresPlusMap.decode(text);
                    words = "";
                } catch {
                    words = "The text is not a painted map.";
                }
            }
            if (turn === this.turn) this.show(map, words);
        }

        async commit() {
            const turn = ++this.turn;
            const text = await hiresPlusMap.encode(this.map);
            if (turn !== this.turn) return;
            this.change(text);
            this.show(this.map);
        }

        change(text) {
            if (text === this.text) return;
            this.remember();
            this.write(text);
        }

        write(text) {
            this.text = text;
            this.input.value = text;
            this.input.dispatchEvent(new Event("input", {bubbles: true}));
        }

        remember() {
            this.past = [...this.past, this.text].slice(-MOST_STEPS_BACK);
        }

        replace(map) {
            this.show(map);
            this.commit();
        }

        // -- tools

        fill() {
            this.replace(hiresPlusMap.filled(this.map.width, this.map.height, this.level));
        }

        invert() {
            this.replace({...this.map, levels: this.map.levels.map(level => hiresPlusMap.WHITE - level)});
        }

        clear() {
            this.change("");
            this.load("");
        }

        undo() {
            if (!this.past.length) return;
            const text = this.past.pop();
            this.write(text);
            this.load(text);
        }

        async upload(file) {
            if (!file) return;
            try {
                this.replace(hiresPlusMap.ofPicture(await createImageBitmap(file)));
            } catch {
                this.say(`${file.name} is not a picture.`);
            }
        }

        async toggleBackdrop() {
            const source = galleryPicture(this.tab)?.src;
            if (!source) this.say("There is no picture in the gallery yet.");
            await this.lay(source && source !== this.backdrop?.src ? source : null);
        }

        async lay(source) {
            this.backdrop = source ? make("img", {src: source}) : null;
            await this.backdrop?.decode().catch(() => this.backdrop = null);
            this.behind.setAttribute("aria-pressed", String(Boolean(this.backdrop)));
            if (!this.text) this.map = this.blank();
            this.draw();
        }

        // -- the stroke

        press(event) {
            if (event.button !== 0) return;
            event.preventDefault();
            this.canvas.setPointerCapture(event.pointerId);
            this.turn++; // what was being loaded is painted over
            this.stroke(this.pointer = this.placeOf(event));
        }

        move(event) {
            this.hover = this.placeOf(event);
            if (this.pointer) this.stroke(this.hover);
            this.draw();
        }

        release() {
            if (!this.pointer) return;
            this.pointer = null;
            this.commit();
        }

        // in 64ths of the longer side
        placeOf(event) {
            const {clientWidth, clientHeight} = this.canvas;
            const [wide, high] = this.shape();
            return [event.offsetX / clientWidth * wide, event.offsetY / clientHeight * high];
        }

        stroke(to) {
            const [x, y] = this.pointer;
            const count = Math.ceil(Math.hypot(to[0] - x, to[1] - y) * 2) || 1;
            for (let i = 1; i <= count; i++) this.dab(x + (to[0] - x) * i / count, y + (to[1] - y) * i / count);
            this.pointer = to;
            this.draw();
        }

        // the cells whose centres lie under a round brush, and the one in its middle
        dab(x, y) {
            const {width, height, levels} = this.map;
            const [wide, high] = this.shape();
            const radius = this.brush.valueAsNumber / 2;
            for (let cell = 0; cell < levels.length; cell++) {
                const dx = (cell % width + 0.5) * wide / width - x;
                const dy = (Math.floor(cell / width) + 0.5) * high / height - y;
                const isMiddle = Math.abs(dx) * 2 * width <= wide && Math.abs(dy) * 2 * height <= high;
                if (isMiddle || Math.hypot(dx, dy) <= radius) levels[cell] = this.level;
            }
        }

        // -- the picture

        // the picture's sides in 64ths of the longer one: the map is stretched over it, whatever its own proportions
        shape() {
            const {naturalWidth: width, naturalHeight: height} = this.backdrop ?? {};
            return hiresPlusMap.scaled(width || sideOf(this.tab, "width"), height || sideOf(this.tab, "height"));
        }

        blank() {
            return hiresPlusMap.plain(...this.shape());
        }

        show(map, words = "") {
            this.map = map;
            const white = map.levels.reduce((sum, level) => sum + level, 0) / hiresPlusMap.WHITE / map.levels.length;
            this.say(words || `${map.width} x ${map.height} cells, ${Math.round(100 * white)} % white`);
            this.draw();
        }

        say(words) {
            this.message.textContent = words;
            this.canvas.setAttribute("aria-label", `Painted map. ${words}`);
        }

        draw() {
            const [wide, high] = this.shape();
            this.drawnShape = `${wide},${high}`;
            const canvas = this.canvas;
            [canvas.width, canvas.height] = [wide, high].map(side => Math.max(1, Math.round(side * SCALE)));
            const context = canvas.getContext("2d");
            const isBlank = !this.text && !this.pointer;
            canvas.classList.toggle("hires-plus-blank", isBlank);
            if (this.backdrop) context.drawImage(this.backdrop, 0, 0, canvas.width, canvas.height);
            context.globalAlpha = isBlank ? 0 : this.backdrop ? 0.6 : 1;
            context.imageSmoothingEnabled = false;
            context.drawImage(this.cells(), 0, 0, canvas.width, canvas.height);
            context.globalAlpha = 1;
            if (this.hover) this.drawBrush(context);
            this.undoing.disabled = !this.past.length;
        }

        cells() {
            const {width, height, levels} = this.map;
            const canvas = make("canvas", {width, height});
            const picture = new ImageData(width, height);
            levels.forEach((level, cell) => picture.data.set([level * 17, level * 17, level * 17, 255], 4 * cell));
            canvas.getContext("2d").putImageData(picture, 0, 0);
            return canvas;
        }

        drawBrush(context) {
            const [x, y] = this.hover;
            for (const [colour, grown] of [["black", 1], ["white", 0]]) { // to be seen on any ground
                context.beginPath();
                context.arc(x * SCALE, y * SCALE, this.brush.valueAsNumber / 2 * SCALE + grown, 0, 2 * Math.PI);
                context.strokeStyle = colour;
                context.stroke();
            }
        }

        // -- the elements

        build() {
            this.canvas = make("canvas", {
                onpointerdown: event => this.press(event),
                onpointermove: event => this.move(event),
                onpointerup: () => this.release(),
                onpointercancel: () => this.release(),
                onpointerleave: () => { this.hover = null; this.draw(); },
            });
            this.canvas.setAttribute("role", "img");
            this.message = make("div", {className: "hires-plus-message"});
            this.message.setAttribute("aria-live", "polite");
            const tools = make("div", {className: "hires-plus-tools"}, ...this.tools(), this.message);
            this.block.append(make("div", {className: "hires-plus-easel"}, this.canvas, tools));
        }

        tools() {
            this.brush = make("input", {type: "range", min: 1, max: 32, value: 8});
            this.undoing = button("Undo", "Undo the last change of the map", () => this.undo());
            this.behind = button("Last picture", "Paint over the picture in the gallery", () => this.toggleBackdrop());
            this.behind.setAttribute("aria-pressed", "false");
            const file = make("input", {type: "file", accept: "image/*", hidden: true});
            file.onchange = () => this.upload(file.files[0]).finally(() => file.value = "");
            const row = (...children) => make("div", {className: "hires-plus-tool-row"}, ...children);
            return [
                row(...this.shades()),
                make("label", {className: "hires-plus-tool-row"}, "Brush", this.brush),
                row(
                    button("Fill", "Fill the map with the chosen shade", () => this.fill()),
                    button("Invert", "Invert the map", () => this.invert()),
                    button("Clear", "Remove the map", () => this.clear()),
                    this.undoing,
                ),
                row(button("Upload", "Use a picture file as the map", () => file.click()), this.behind, file),
            ];
        }

        shades() {
            const made = SHADES.map(([level, name]) => {
                const shade = button("", `Paint ${name}`, () => choose(level));
                shade.classList.add("hires-plus-shade");
                shade.style.background = `rgb(${level * 17} ${level * 17} ${level * 17})`;
                return shade;
            });
            const choose = level => {
                this.level = level;
                made.forEach((shade, i) => shade.setAttribute("aria-pressed", String(SHADES[i][0] === level)));
            };
            choose(this.level);
            return made;
        }
    }

    const paintings = new WeakMap();

    function followAll() {
        for (const block of page().querySelectorAll(".hires-plus-painting")) {
            if (!block.querySelector("[data-testid=textbox]")) continue; // gradio is still building it
            if (!paintings.has(block)) paintings.set(block, new Painting(block));
            paintings.get(block).follow();
        }
    }

    if (typeof CompressionStream === "function") setInterval(followAll, FOLLOW_EVERY);
})();
