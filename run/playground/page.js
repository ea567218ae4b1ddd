'use strict';
const $ = id => document.getElementById(id);
const token = new URLSearchParams(location.search).get('token') || '';
const state = {models: [], picture: null, donor: null, put: new Map(), cells: [], codes: null, chosen: null, photo: null, image: null, stroke: null};

/** An element with properties and children; text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(place, text, bad = false) {
  $(place).textContent = text;
  $(place).classList.toggle('bad', bad);
}

/** The response to a request, or an Error with the server's sentence. */
async function ask(path, request, signal) {
  const headers = {'X-Token': token};
  if (request) headers['Content-Type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, {method: request ? 'POST' : 'GET', headers, body: request && JSON.stringify(request), signal});
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('the playground does not answer; is it still running in its terminal?');
  }
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

function showCommand(place, command) {
  const copy = make('button', {type: 'button', textContent: 'Copy'});
  copy.onclick = async () => {
    try { await navigator.clipboard.writeText(command); copy.textContent = 'Copied'; }
    catch { copy.textContent = 'Select the text to copy it'; }
  };
  place.className = 'command';
  place.replaceChildren(make('div', {className: 'caption', textContent: 'The same in a shell'}), make('pre', {textContent: command}), copy);
}

// -- tabs ------------------------------------------------------------------------------------------------------------
const tabs = [...document.querySelectorAll('[role=tab]')];
function open(tab) {
  for (const other of tabs) {
    other.setAttribute('aria-selected', other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute('aria-controls')).hidden = other !== tab;
  }
}
tabs.forEach((tab, i) => {
  tab.onclick = () => open(tab);
  tab.onkeydown = event => {
    if (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight') return;
    const next = tabs[(i + (event.key === 'ArrowRight' ? 1 : tabs.length - 1)) % tabs.length];
    open(next);
    next.focus();
  };
});

// -- tokenize --------------------------------------------------------------------------------------------------------
const tokenizer = () => state.models[$('tokenizer').value];

/** A field for files, and the examples; `chosen` gets {name, data}; what cannot be read is told in `message`. */
function picker(place, label, message, chosen) {
  const file = make('input', {type: 'file', accept: 'image/*'});
  file.setAttribute('aria-label', label);
  const buttons = [];
  const take = (picture, button) => {
    buttons.forEach(other => other.setAttribute('aria-pressed', other === button));
    chosen(picture);
  };
  const read = one => {
    const reader = new FileReader();
    reader.onload = () => take({name: one.name, data: reader.result.split(',')[1] || ''}, null);
    reader.onerror = () => say(message, `${one.name} cannot be read.`, true);
    reader.readAsDataURL(one);
  };
  file.onchange = () => file.files.length && read(file.files[0]);
  state.examples.forEach((example, i) => {
    const button = make('button', {type: 'button'}, make('img', {src: example.data, alt: `example ${i + 1}`, className: 'pixels'}));
    button.onclick = () => take({name: example.name, data: example.data.split(',')[1], example: example.data}, button);
    button.setAttribute('aria-pressed', false);
    buttons.push(button);
  });
  const box = place.closest('fieldset');
  box.ondragover = event => { event.preventDefault(); box.classList.add('over'); };
  box.ondragleave = () => box.classList.remove('over');
  box.ondrop = event => {
    event.preventDefault();
    box.classList.remove('over');
    if (event.dataTransfer.files.length) read(event.dataTransfer.files[0]);
  };
  place.replaceChildren(file, make('div', {className: 'examples'}, ...buttons));
}

function slider(id, label, properties, says, moved = later) {
  const input = make('input', {type: 'range', id, ...properties}), shown = make('span');
  const show = () => { input.ariaValueText = shown.textContent = says(input.value); };
  input.oninput = () => { show(); moved(); };
  show();
  return make('label', {}, `${label}: `, shown, input);
}

/** The controls that a tokenizer's own description asks for. */
function setUpTokenizer() {
  const model = tokenizer();
  state.put.clear();
  state.codes = state.chosen = null;
  $('editor').hidden = true;
  $('maps').replaceChildren();
  if (!model) return say('tokenizer-facts', 'No tokenizer is loaded.');
  say('tokenizer-facts', `${model.size} x ${model.size} pixels; ${model.latents}`);
  const changes = [];
  if (model.kept) {
    const {count, unit, tokens, fewest} = model.kept;
    const says = n => tokens > 1 ? `${n * tokens} of ${count * tokens}` : `${n} of ${count}`;
    changes.push(slider('kept', `${tokens ? 'tokens' : unit + 's'} kept`, {min: fewest, max: count, value: count}, says));
  }
  if (model.noise) changes.push(slider('noise', 'noise', {min: 0, max: 1, step: 0.05, value: 0}, n => `${Math.round(100 * n)} %`));
  $('changes').replaceChildren(...changes);
  $('exchange').hidden = !model.branches || model.branches.length < 2;
  $('branches').replaceChildren(...(model.branches || []).map((name, k) => {
    const box = make('input', {type: 'checkbox', value: k});
    box.onchange = () => {
      if (state.donor) return later();
      say('tokenize-message', 'Choose the second picture, too.');
    };
    return make('label', {}, box, ` branch ${name}`);
  }));
  later();
}

function tokenizeRequest() {
  const request = {model: Number($('tokenizer').value), picture: state.picture, put: [...state.put.values()]};
  const model = tokenizer();
  if (model.kept && Number($('kept').value) < model.kept.count) request.kept = Number($('kept').value);
  if (model.noise) request.noise = Number($('noise').value);
  const branches = [...$('branches').querySelectorAll('input:checked')].map(box => Number(box.value));
  if (branches.length && state.donor) Object.assign(request, {branches, donor: state.donor});
  $('undo').hidden = !(request.put.length || request.kept || request.noise || branches.length);
  return request;
}

let waiting = null, running = null;
/** Ask again, once what the user is moving rests for a moment; an answer that is out of date is dropped. */
function later() {
  clearTimeout(waiting);
  waiting = setTimeout(update, 120);
}

async function update() {
  if (!state.picture || !tokenizer()) return;
  if (running) running.abort();
  const mine = running = new AbortController();
  say('tokenize-message', 'working ...');
  try {
    const answer = await (await ask('tokenize', tokenizeRequest(), mine.signal)).json();
    if (mine === running) showTokenized(answer);
  } catch (error) {
    if (error.name !== 'AbortError') say('tokenize-message', error.message, true);
  }
}

function showTokenized(answer) {
  say('tokenize-message', '');
  $('tokenized').hidden = false;
  $('original').src = answer.original;
  $('rebuilt').src = answer.rebuilt;
  $('error-map').src = answer.error_map;
  const ssim = answer.ssim === null ? '' : `, SSIM ${answer.ssim.toFixed(4)}`;
  $('numbers').textContent = `PSNR ${answer.psnr.toFixed(2)} dB${ssim}; ${answer.seconds.toFixed(2)} s`;
  Object.assign($('save-rebuilt'), {href: answer.rebuilt, download: answer.file});
  const {name, example} = state.picture;
  $('save-example').hidden = !example;
  if (example) Object.assign($('save-example'), {href: example, download: name, textContent: `Download ${name}`});
  showCommand($('tokenize-command'), answer.command);
  $('codes').hidden = !answer.codes;
  state.codes = answer.codes;
  if (answer.codes) showCodes();
}

// -- codes -----------------------------------------------------------------------------------------------------------
function showCodes() {
  if (!$('maps').childElementCount) drawMaps();
  const model = tokenizer(), kept = model.kept ? Number($('kept').value) : Infinity;
  for (const cell of state.cells) {
    const code = state.codes[cell.branch][cell.place];
    cell.code = code;
    cell.button.style.setProperty('--hue', (code * 137.508) % 360);
    cell.button.setAttribute('aria-label', `place ${cell.place}, code ${code}`);
    const part = model.kept && model.kept.tokens ? cell.place / model.kept.tokens : cell.map;
    cell.button.classList.toggle('off', part >= kept);
    cell.button.classList.toggle('put', state.put.has(`${cell.branch}:${cell.place}`));
  }
}

function drawMaps() {
  const model = tokenizer();
  state.cells = [];
  const boxes = model.branches.flatMap((name, branch) => model.maps.map((map, number) => {
    const title = (model.branches.length > 1 ? `branch ${name}, ` : '') + map.title;
    const grid = make('div', {className: 'map', role: 'group', ariaLabel: `codes, ${title}`});
    grid.style.maxWidth = `${Math.min(360, 48 * map.columns)}px`;
    grid.style.gridTemplateColumns = `repeat(${map.columns}, minmax(0, 1fr))`;
    const cells = Array.from({length: map.count}, (_, i) => {
      const cell = {branch, place: map.start + i, map: number, button: make('button', {type: 'button', className: 'cell'})};
      cell.button.tabIndex = i ? -1 : 0;
      cell.button.onmouseenter = cell.button.onfocus = () => seek(cell);
      cell.button.onmouseleave = cell.button.onblur = () => seek(null);
      cell.button.onclick = () => edit(cell);
      return cell;
    });
    grid.onkeydown = event => walk(event, cells, map.columns);
    grid.append(...cells.map(cell => cell.button));
    state.cells.push(...cells);
    return make('div', {}, make('h3', {textContent: title}), grid);
  }));
  $('maps').replaceChildren(...boxes);
}

/** Arrow keys go from cell to cell; one cell of a map is where Tab arrives. */
function walk(event, cells, columns) {
  const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -cells.length, End: cells.length};
  if (!(event.key in steps)) return;
  event.preventDefault();
  const now = cells.findIndex(cell => cell.button === event.target);
  const next = Math.max(0, Math.min(cells.length - 1, now + steps[event.key]));
  cells[now].button.tabIndex = -1;
  cells[next].button.tabIndex = 0;
  cells[next].button.focus();
}

/** Show every place of the same branch with the same code. */
function seek(cell) {
  const same = cell ? state.cells.filter(other => other.branch === cell.branch && other.code === cell.code) : [];
  $('maps').classList.toggle('seeking', Boolean(cell));
  for (const other of state.cells) other.button.classList.remove('same');
  for (const other of same) other.button.classList.add('same');
  if (!cell) return;
  const places = same.map(other => other.place), shown = places.slice(0, 24).join(', ');
  $('code-says').textContent = `place ${cell.place}: code ${cell.code}, at ${places.length} ` +
    `place${places.length > 1 ? 's' : ''}: ${shown}${places.length > 24 ? ' ...' : ''}`;
}

function edit(cell) {
  const {branches, vocab} = tokenizer();
  state.chosen = cell;
  $('editor').hidden = false;
  $('editor-says').textContent = `Code at place ${cell.place}${branches.length > 1 ? ` of branch ${branches[cell.branch]}` : ''}, 0 to ${vocab - 1}`;
  $('code').value = cell.code;
  $('code').focus();
}

function exchange(code) {
  const {branch, place, button} = state.chosen, key = `${branch}:${place}`;
  if (code === null) state.put.delete(key); else state.put.set(key, [branch, place, code]);
  $('editor').hidden = true;
  button.focus();
  later();
}

$('editor').noValidate = true;  // the server says what a codebook has
$('editor').onsubmit = event => { event.preventDefault(); exchange(Number($('code').value)); };
$('random').onclick = () => exchange(Math.floor(Math.random() * tokenizer().vocab));
$('own').onclick = () => exchange(null);
$('editor').onkeydown = event => { if (event.key === 'Escape') { $('editor').hidden = true; state.chosen.button.focus(); } };
$('tokenizer').onchange = setUpTokenizer;
$('tokenize-form').onsubmit = event => event.preventDefault();
$('undo').onclick = () => { setUpTokenizer(); $('tokenizer').focus(); };

// -- generate --------------------------------------------------------------------------------------------------------
const generator = () => state.models[$('generator').value];
let drawing = null;

/** The fields that a generator's own description asks for: its classes, and its options in `place`. */
function setUpFields(model, labels, classes, place) {
  $(classes).replaceChildren(...model.classes.map(value => make('option', {value})));
  if (!$(labels).value) $(labels).value = model.classes[0];
  $(place).replaceChildren(...Object.entries(model.options).map(([name, {value, meaning}]) => {
    const text = [value].flat().join(', ');
    const input = make('input', {value: text, defaultValue: text, inputMode: 'decimal', autocomplete: 'off'});
    input.dataset.option = name;
    return make('label', {}, name.replace('_', '-').replace('scale', 'guidance'), input, make('small', {textContent: meaning}));
  }));
}

function setUpGenerator() {
  if (!generator()) return say('generate-message', 'No generator is loaded.');
  setUpFields(generator(), 'labels', 'classes', 'options');
}

/** The options of a model: what the fields in `place` say, of those that it takes; `own`: they were set up for it. */
function optionsOf(model, place, own) {
  const options = {};
  for (const input of $(place).querySelectorAll('input')) {
    const name = input.dataset.option, words = input.value.split(',').map(word => word.trim());
    if (!(name in model.options) || input.value.trim() === '') continue;
    if (!own && input.value === input.defaultValue) continue;  // the second one's own defaults
    const numbers = words.map(word => word === '' || isNaN(word) ? word : Number(word));
    options[name] = numbers.length > 1 ? numbers : numbers[0];
  }
  return options;
}

async function draw() {
  if (drawing) drawing.abort();
  const mine = drawing = new AbortController();
  const numbers = [...new Set([$('generator').value, $('second').value].filter(value => value !== ''))];
  say('generate-message', '');
  $('stop').disabled = false;
  $('results').replaceChildren();
  await Promise.all(numbers.map(number => drawOne(state.models[number], mine.signal)));
  if (mine === drawing) $('stop').disabled = true;
}

async function drawOne(model, signal) {
  const status = make('p', {className: 'message', role: 'status', textContent: 'waiting ...'});
  const gallery = make('div', {className: 'gallery'}), replay = make('div'), command = make('div');
  $('results').append(make('section', {className: 'card'}, make('h2', {textContent: model.name}), gallery, replay, status, command));
  const looks = [];
  const see = answer => {
    if (answer.error) throw new Error(answer.error);
    if (answer.pictures) {
      looks.push(answer.pictures);
      status.textContent = `look ${looks.length} ...`;
      paint(gallery, answer.pictures);
    } else {
      finish(gallery, answer.done);
      if (looks.length > 1) replay.replaceChildren(replayer(gallery, looks));
      status.textContent = `${answer.done.length} pictures in ${answer.seconds.toFixed(1)} s`;
      showCommand(command, answer.command);
    }
  };
  try {
    const request = {model: model.number, labels: $('labels').value, num: Number($('num').value),
      seed: Number($('seed').value), options: optionsOf(model, 'options', model === generator())};
    const reader = (await ask('generate', request, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const lines = (rest + piece.value).split('\n');
      rest = lines.pop();
      for (const line of lines) see(JSON.parse(line));
    }
  } catch (error) {
    status.classList.add('bad');
    status.textContent = error.name === 'AbortError' ? 'stopped' : error.message;
  }
}

function paint(gallery, pictures) {
  while (gallery.childElementCount < pictures.length) {
    gallery.append(make('figure', {}, make('img', {className: 'pixels', alt: 'a picture on its way'}), make('figcaption')));
  }
  gallery.querySelectorAll('img').forEach((image, i) => { image.src = pictures[i]; });
}

function finish(gallery, done) {
  paint(gallery, done.map(picture => picture.data));
  gallery.querySelectorAll('figure').forEach((figure, i) => {
    const {data, file} = done[i], name = done[i].class;
    figure.querySelector('img').alt = `sample of ${name}`;
    figure.querySelector('figcaption').textContent = name;
    if (done[i].says) figure.append(make('p', {className: 'caption', textContent: done[i].says}));
    figure.append(make('a', {className: 'button', href: data, download: file, textContent: 'Download', ariaLabel: `Download ${file}`}));
  });
}

/** A slider over what could be seen on the way; the last look is the finished pictures. */
function replayer(gallery, looks) {
  const last = looks.length - 1;
  const input = make('input', {type: 'range', min: 0, max: last, value: last}), shown = make('span');
  const show = () => { input.ariaValueText = shown.textContent = `${Number(input.value) + 1} of ${last + 1}`; };
  input.oninput = () => { show(); paint(gallery, looks[input.value]); };
  show();
  return make('label', {className: 'caption'}, 'how they came about: ', shown, input);
}

$('generator').onchange = setUpGenerator;
$('generate-form').onsubmit = event => { event.preventDefault(); draw(); };
$('stop').onclick = () => drawing && drawing.abort();

// -- edit ------------------------------------------------------------------------------------------------------------
const editor = () => state.models[$('editor-model').value];
const mask = document.createElement('canvas');  // white is what is to be drawn anew; as large as the model's pictures

function setUpEditor() {
  const model = editor();
  if (!model) return say('edit-message', 'No generator is loaded.');
  setUpFields(model, 'edit-labels', 'edit-classes', 'edit-options');
  $('brush-place').replaceChildren(slider('brush', 'brush', {min: 1, max: Math.ceil(model.size / 2), value: Math.ceil(model.size / 8)},
    n => `${n} of ${model.size} pixels wide`, () => {}));
  if (mask.width !== model.size) {
    mask.width = mask.height = $('paper').width = $('paper').height = model.size;
    fill('black');
  }
  showPaper();
}

function fill(colour, left = 0, top = 0, right = 100, bottom = 100) {
  const context = mask.getContext('2d', {willReadFrequently: true}), percent = mask.width / 100;
  context.fillStyle = colour;
  context.fillRect(Math.round(left * percent), Math.round(top * percent), Math.round((right - left) * percent), Math.round((bottom - top) * percent));
  showPaper();
}

/** The middle of the photo, which is what the model sees, red where it is marked. */
function showPaper() {
  const size = mask.width, paper = $('paper').getContext('2d'), image = state.image;
  paper.clearRect(0, 0, size, size);
  if (image) {
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    paper.drawImage(image, (image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2, side, side, 0, 0, size, size);
  }
  const marks = mask.getContext('2d', {willReadFrequently: true}).getImageData(0, 0, size, size);
  let count = 0;
  for (let i = 0; i < marks.data.length; i += 4) {
    const marked = marks.data[i] >= 128;
    count += marked;
    marks.data.set([224, 48, 64, marked ? 150 : 0], i);
  }
  const over = make('canvas', {width: size, height: size});
  over.getContext('2d').putImageData(marks, 0, 0);
  paper.drawImage(over, 0, 0);
  $('marked').textContent = `${Math.round(100 * count / (size * size))} % of the picture is marked`;
}

/** A round mark from where the pointer was to where it is. */
function brushTo(event) {
  const {left, top, width} = $('paper').getBoundingClientRect(), scale = mask.width / width;
  const here = [(event.clientX - left) * scale, (event.clientY - top) * scale];
  const context = mask.getContext('2d', {willReadFrequently: true});
  context.strokeStyle = $('erase').ariaPressed === 'true' ? 'black' : 'white';
  context.lineWidth = Number($('brush').value);
  context.lineCap = 'round';
  context.beginPath();
  context.moveTo(...(state.stroke || here));
  context.lineTo(...here);
  context.stroke();
  state.stroke = here;
  showPaper();
}

function choosePhoto(photo) {
  state.photo = photo;
  state.image = null;
  const image = new Image();
  image.onload = () => { state.image = image; showPaper(); };
  image.onerror = () => say('edit-message', `This browser cannot show ${photo.name}; it can be marked all the same.`);
  image.src = `data:image/png;base64,${photo.data}`;
  say('edit-message', '');
  $('paint').hidden = false;
  $('change').disabled = !editor();
  showPaper();
}

async function change() {
  const model = editor();
  if (drawing) drawing.abort();
  const mine = drawing = new AbortController();
  const data = mask.toDataURL('image/png');
  say('edit-message', 'working ...');
  $('edited').hidden = true;
  try {
    const answer = await (await ask('edit', {model: model.number, picture: state.photo, mask: {name: 'mask.png', data: data.split(',')[1]},
      labels: $('edit-labels').value, num: Number($('edit-num').value), seed: Number($('edit-seed').value),
      options: optionsOf(model, 'edit-options', true)}, mine.signal)).json();
    $('edited-pictures').replaceChildren();
    finish($('edited-pictures'), answer.done);
    $('remarks').replaceChildren(...answer.remarks.map(textContent => make('p', {className: 'caption', textContent})));
    $('save-mask').href = data;
    const {name, example} = state.photo;
    $('save-photo').hidden = !example;
    if (example) Object.assign($('save-photo'), {href: example, download: name, textContent: `Download ${name}`});
    showCommand($('edit-command'), answer.command);
    $('edited').hidden = false;
    say('edit-message', `${answer.done.length} pictures in ${answer.seconds.toFixed(1)} s`);
  } catch (error) {
    if (error.name !== 'AbortError') say('edit-message', error.message, true);
  }
}

$('paper').onpointerdown = event => { $('paper').setPointerCapture(event.pointerId); state.stroke = null; brushTo(event); };
$('paper').onpointermove = event => { if (event.buttons) brushTo(event); };
$('erase').onclick = () => { $('erase').ariaPressed = $('erase').ariaPressed !== 'true'; };
$('clear').onclick = () => fill('black');
$('everything').onclick = () => fill('white');
$('rectangle').onclick = () => fill('white', ...['left', 'top', 'right', 'bottom'].map(side => Number($(`side-${side}`).value)));
$('editor-model').onchange = setUpEditor;
$('edit-form').onsubmit = event => { event.preventDefault(); change(); };

// -- start -----------------------------------------------------------------------------------------------------------
async function start() {
  const answer = await (await ask('models')).json();
  state.models = answer.models;
  state.examples = answer.examples;
  $('num').max = $('edit-num').max = answer.most;
  const working = kind => state.models.filter(model => model.kind === kind && !model.error);
  const option = model => make('option', {value: model.number, textContent: model.name, title: model.reference});
  $('tokenizer').replaceChildren(...working('tokenizer').map(option));
  $('generator').replaceChildren(...working('generator').map(option));
  $('editor-model').replaceChildren(...working('generator').map(option));
  $('second').replaceChildren(make('option', {value: '', textContent: 'none'}), ...working('generator').map(option));
  $('draw').disabled = !working('generator').length;
  $('problems').replaceChildren(...state.models.filter(model => model.error).map(model =>
    make('p', {className: 'card problem', textContent: (model.error.includes(model.reference) ? '' : `${model.reference}: `) + model.error})));
  picker($('picture'), 'Picture', 'tokenize-message', picture => { state.picture = picture; state.put.clear(); later(); });
  picker($('donor'), 'Second picture', 'tokenize-message', picture => { state.donor = picture; later(); });
  picker($('photo'), 'Photo', 'edit-message', choosePhoto);
  setUpTokenizer();
  setUpGenerator();
  setUpEditor();
}
start().catch(error => say('tokenize-message', error.message, true));
