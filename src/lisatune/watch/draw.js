// Pieces of a page and figures. Text goes in as text alone, so that no name and no row can become markup.

export const COLOURS = ['#3b82f6', '#f97316', '#10b981', '#a855f7', '#ef4444', '#14b8a6', '#ec4899', '#b08d00', '#64748b', '#84a31a']
export const DASHES = ['', '7 4', '2 3', '8 3 2 3']
const GIB = 2 ** 30

// --- pieces

function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (value === true) element.setAttribute(name, '')
    else if (value !== false && value != null) element.setAttribute(name, value)
  }
  element.append(...children.flat(Infinity).filter(child => child != null && child !== false))
  return element
}

export const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children)
export const s = (tag, attributes, ...children) =>
  make(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children)

export const figure = (title, note, ...drawn) =>
  h('figure', {}, h('figcaption', {}, h('b', {}, title), note), ...drawn)

export function table(head, rows) {
  const cells = (row, kind) => h('tr', {}, row.map(cell => h(kind, {}, cell)))
  return h('div', {class: 'scroll'}, h('table', {}, cells(head, 'th'), rows.map(row => cells(row, 'td'))))
}

export const swatch = (colour, dash) =>
  s('svg', {class: 'swatch', viewBox: '0 0 24 8', 'aria-hidden': true},
    s('line', {x1: 0, x2: 24, y1: 4, y2: 4, stroke: colour, 'stroke-width': 4, 'stroke-dasharray': dash || null}))

// --- numbers for people

export const whole = value => (value == null ? '-' : Math.round(value).toLocaleString('en'))

export const number = value =>
  value == null ? '-' : Math.abs(value) >= 1000 ? whole(value) : value.toLocaleString('en', {maximumSignificantDigits: 4})

export const gib = bytes =>
  bytes == null ? '-' : bytes >= GIB / 10 ? `${(bytes / GIB).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`

export function duration(seconds) {
  if (seconds == null) return '-'
  const [minutes, hours, days] = [60, 3600, 86400].map(unit => Math.floor(seconds / unit))
  if (days) return `${days} d ${hours % 24} h`
  if (hours) return `${hours} h ${minutes % 60} min`
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.round(seconds)} s`
}

// --- axes

function ticks(low, high, count) {
  const raw = (high - low) / count || 1
  const power = 10 ** Math.floor(Math.log10(raw))
  const step = [1, 2, 5, 10].map(m => m * power).find(one => one >= raw)
  const found = []
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step)
  return found
}

const short = value =>
  Math.abs(value) >= 10000
    ? value.toLocaleString('en', {notation: 'compact', maximumSignificantDigits: 3})
    : `${Number(value.toPrecision(4))}`

function axes(box, x, y, {xlabel, format = short}) {
  const {left, top, right, bottom} = box
  return [
    ticks(y.low, y.high, 4).map(value => [
      s('line', {class: 'grid', x1: left, x2: right, y1: y(value), y2: y(value)}),
      s('text', {x: left - 6, y: y(value) + 4, 'text-anchor': 'end'}, format(value)),
    ]),
    xTicks(box, x),
    s('text', {x: right, y: bottom + 32, 'text-anchor': 'end'}, xlabel),
    s('line', {class: 'axis', x1: left, x2: right, y1: bottom, y2: bottom}),
    s('line', {class: 'axis', x1: left, x2: left, y1: top, y2: bottom}),
  ].flat(3)
}

const xTicks = ({bottom, left, right}, x) =>
  ticks(x.low, x.high, Math.max(3, Math.round((right - left) / 110))).map(value =>
    s('text', {x: x(value), y: bottom + 16, 'text-anchor': 'middle'}, short(value)))

function scale(low, high, from, to) {
  const span = high - low || 1
  return Object.assign(value => from + ((value - low) / span) * (to - from), {low, high: low + span})
}

// --- lines

const MOST_POINTS = 1200

// of many points the mean of each few: what a screen cannot show is not drawn
function thinned(points) {
  if (points.length <= MOST_POINTS) return points
  const size = Math.ceil(points.length / MOST_POINTS)
  const found = []
  for (let i = 0; i < points.length; i += size) {
    const some = points.slice(i, i + size)
    found.push([some.at(-1)[0], some.reduce((sum, point) => sum + point[1], 0) / some.length])
  }
  return found
}

function range(series, lines, zero) {
  const clear = series.filter(one => !one.faint).flatMap(one => one.points.map(point => point[1]))
  const faint = series.filter(one => one.faint).flatMap(one => one.points.map(point => point[1])).sort((a, b) => a - b)
  const cut = [0.02, 0.98].map(share => faint[Math.floor(share * (faint.length - 1))])  // a spike shall not flatten all else
  const all = [...clear, ...cut, ...lines.map(line => line.value)].filter(Number.isFinite)
  let low = Infinity, high = -Infinity
  for (const value of all) { low = Math.min(low, value); high = Math.max(high, value) }
  if (zero) low = Math.min(0, low)
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1
  return [zero ? low : low - room, high + room]
}

// series: {name, colour, dash, points: [[x, y]], faint, marks}; lines: {name, value, colour}, across the whole figure
export function chart(width, {series, lines = [], xlabel, label, zero = false, format = short, height = 240}) {
  series = series.filter(one => one.points.length).map(one => ({...one, points: thinned(one.points)}))
  if (!series.length) return h('p', {class: 'none'}, 'Nothing yet.')
  const box = {left: 52, top: 10, right: width - 10, bottom: height - 38}
  const ends = series.flatMap(one => [one.points[0][0], one.points.at(-1)[0]])
  const x = scale(Math.min(...ends), Math.max(...ends), box.left, box.right)
  const y = scale(...range(series, lines, zero), box.bottom, box.top)
  const inside = value => Math.max(box.top, Math.min(box.bottom, y(value)))
  const path = one => one.points.map(([a, b], i) => `${i ? 'L' : 'M'}${x(a).toFixed(1)} ${inside(b).toFixed(1)}`).join('')
  const line = one => s('path', {
    class: 'line', d: path(one), stroke: one.colour, 'stroke-width': one.faint ? 1 : 2, opacity: one.faint ? 0.3 : null,
    'stroke-dasharray': one.dash || null,
  })
  const marks = one => one.points.map(([a, b]) => s('circle', {cx: x(a), cy: inside(b), r: 3, fill: one.colour}))
  const across = lines.map(one => s('line', {
    x1: box.left, x2: box.right, y1: y(one.value), y2: y(one.value), stroke: one.colour, 'stroke-width': 1.5, 'stroke-dasharray': '2 3',
  }))
  const drawn = s('svg', {width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label},
    axes(box, x, y, {xlabel, format}), across, series.map(line), series.filter(one => one.marks && one.points.length < 200).map(marks))
  return h('div', {}, drawn, readout(drawn, box, x, series, xlabel, format))
}

// what the lines say where one points, or in the end
function readout(drawn, box, x, series, xlabel, format) {
  const named = series.filter(one => one.name)
  const cursor = s('line', {class: 'cursor', y1: box.top, y2: box.bottom, visibility: 'hidden'})
  const told = h('p', {class: 'legend'})
  const show = at => {
    const place = at == null ? '' : `${xlabel} ${whole(at)}`
    told.replaceChildren(...named.map(one => {
      const [, value] = at == null ? one.points.at(-1) : one.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a))
      return h('span', {}, swatch(one.colour, one.dash), `${one.name} `, h('b', {}, format === short ? number(value) : format(value)))
    }), h('span', {}, place))
    if (at != null) make(cursor, {x1: x(at), x2: x(at), visibility: 'visible'}, [])
    else cursor.setAttribute('visibility', 'hidden')
  }
  drawn.append(cursor)
  drawn.addEventListener('pointermove', event => {
    const place = event.clientX - drawn.getBoundingClientRect().left
    const at = x.low + ((place - box.left) / (box.right - box.left)) * (x.high - x.low)
    show(Math.max(x.low, Math.min(x.high, at)))
  })
  drawn.addEventListener('pointerleave', () => show(null))
  show(null)
  return told
}

// --- the map of what trained

const LEVELS = 6

// units: names, from the top; rows: {step, on: numbers of the units that train}; each row stands for the steps since the one before
export function map(width, {units, rows, label, colour = COLOURS[2]}) {
  const each = Math.max(2, Math.min(14, Math.floor(260 / units.length)))
  const letters = Math.max(...units.map(name => name.length))
  const share = 44
  const box = {left: 14 + 7 * Math.min(letters, 14), top: 6, right: width - share - 14}
  box.bottom = box.top + each * units.length
  const first = rows[0].step - 1, last = rows.at(-1).step
  const x = scale(first, last, box.left, box.right)
  const columns = Math.min(rows.length, Math.floor((box.right - box.left) / 2))
  const counts = Array.from({length: columns}, () => ({on: new Map(), rows: 0, from: null, to: null}))
  rows.forEach((row, i) => {
    const column = counts[Math.floor((i * columns) / rows.length)]
    column.from ??= i ? rows[i - 1].step : first
    column.to = row.step
    column.rows += 1
    for (const unit of row.on) column.on.set(unit, (column.on.get(unit) ?? 0) + 1)
  })
  const paths = Array.from({length: LEVELS}, () => [])
  for (const column of counts) {
    for (const [unit, count] of column.on) {
      const [from, to] = [x(column.from), x(column.to)]
      paths[Math.ceil((count / column.rows) * LEVELS) - 1].push(
        `M${from.toFixed(1)} ${box.top + unit * each}h${Math.max(1, to - from).toFixed(1)}v${Math.max(1, each - 1)}h${(-Math.max(1, to - from)).toFixed(1)}z`)
    }
  }
  const height = box.bottom + 38
  return s('svg', {width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label},
    s('rect', {class: 'field', x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top}),
    paths.map((some, level) => some.length && s('path', {d: some.join(''), fill: colour, opacity: (level + 1) / LEVELS})).filter(Boolean),
    unitNames(units, box, each), xTicks(box, x), s('text', {x: box.right, y: box.bottom + 32, 'text-anchor': 'end'}, 'step'),
    shares(units, rows, box, each, share, colour))
}

function unitNames(units, box, each) {
  const every = Math.max(1, Math.ceil(12 / each))
  return units.map((name, i) => (i % every && Number.isInteger(Number(name)) ? null :
    s('text', {x: box.left - 6, y: box.top + i * each + each / 2 + 4, 'text-anchor': 'end'}, name.slice(0, 14))))
}

// in how many of the steps each unit trained
function shares(units, rows, box, each, room, colour) {
  const counts = units.map(() => 0)
  for (const row of rows) for (const unit of row.on) counts[unit] += 1
  const most = Math.max(...counts, 1)
  const left = box.right + 8
  return [
    counts.map((count, i) => s('rect', {
      x: left, y: box.top + i * each, width: (room * count) / most, height: Math.max(1, each - 1), fill: colour, opacity: 0.55,
    })),
    s('text', {x: left + room, y: box.bottom + 16, 'text-anchor': 'end'}, `${Math.round((100 * most) / rows.length)}%`),
  ].flat()
}

// --- bytes by part

export const KINDS = {
  weights: ['weights', COLOURS[0]], gradients: ['gradients', COLOURS[7]], state: ['optimizer state', COLOURS[3]],
  gathered: ['gathered weights', COLOURS[5]], activations: ['activations', COLOURS[2]], temporaries: ['temporaries', COLOURS[4]],
}

// bars: {name, bytesOf, total, mark}; on one scale, with a mark for what was measured, and a line for what there is
export function parts(bars, {most = 0, budget = 0} = {}) {
  const end = Math.max(most, budget, ...bars.flatMap(bar => [bar.total ?? 0, bar.mark ?? 0])) * 1.02 || 1
  const percent = bytes => `${((100 * bytes) / end).toFixed(2)}%`
  const kindsOf = bar => Object.entries(KINDS).map(([kind, [name, colour]]) => [name, colour, Object.entries(bar.bytesOf ?? {})
    .filter(([part]) => part.split('/')[0] === kind).reduce((sum, [, size]) => sum + size, 0)]).filter(([, , size]) => size > 0)
  const used = new Map(bars.flatMap(kindsOf).map(([name, colour]) => [name, colour]))
  return h('div', {class: 'parts'},
    bars.map(bar => h('div', {},
      h('div', {class: 'over'}, h('span', {}, bar.name), h('span', {}, bar.told)),
      s('svg', {class: 'bar', role: 'img', 'aria-label': `${bar.name}: ${bar.told}`},
        kindsOf(bar).reduce(([at, drawn], [name, colour, size]) => [at + size, [...drawn,
          s('rect', {x: percent(at), width: percent(size), y: 3, height: 16, fill: colour}, s('title', {}, `${name}: ${gib(size)}`))]], [0, []])[1],
        bar.mark && s('line', {class: 'mark', x1: percent(bar.mark), x2: percent(bar.mark), y1: 0, y2: 22}),
        budget && s('line', {class: 'budget', x1: percent(budget), x2: percent(budget), y1: 0, y2: 22})))),
    h('p', {class: 'legend'}, [...used].map(([name, colour]) => h('span', {}, swatch(colour), name)),
      bars.some(bar => bar.mark) && h('span', {}, h('span', {class: 'tick'}), 'measured'),
      budget > 0 && h('span', {}, h('span', {class: 'tick dashed'}), `there is ${gib(budget)}`)))
}
