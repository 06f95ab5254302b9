/* The switch of prediction, in the panel and in the settings, and the panel's figures about it.
   What it shows comes with the live stream, so all tabs agree. */
(() => {
  "use strict";
  const HELD_MS = 3000;                     /* a press shows at once and waits this long for the stream */
  const ARM_MS = 4000;
  const text = (el, value) => { if (el.textContent !== value) el.textContent = value; };

  /* A button that asks for the other state; it cannot be used while the policy never predicts. */
  PreScope.predictionSwitch = (button, trigger) => {
    let held = null, until = 0, view = null;
    const show = () => {
      const waits = held !== null && performance.now() < until;
      if (!waits || view?.on === held) held = null;
      const state = held ?? view?.on ?? true;
      button.setAttribute("aria-checked", String(state));
      text(button.firstElementChild, state ? "On" : "Off");
      const never = view?.state === "never";
      button.setAttribute("aria-disabled", String(never));
      button.title = never ? view.text : "";
    };
    button.addEventListener("click", () => {
      if (!view || view.state === "never") return;
      held = !(held ?? view.on);
      until = performance.now() + HELD_MS;
      show();
      trigger("switch_prediction", { on: held });
      setTimeout(show, HELD_MS + 50);
    });
    return (now) => { view = now; show(); };
  };

  PreScope.prediction = (at, trigger) => {
    const { fixed, seconds } = PreScope;
    const showSwitch = PreScope.predictionSwitch(at.switch, trigger);
    const parts = [...at.aheadbar.children];
    const keys = [...at.aheadkeys.querySelectorAll("b")];
    const percent = (share) => (share === null || share === undefined ? "–" : `${fixed(share * 100, 0)} %`);
    const duration = (s) => (s > 0 && s < 1e-4 ? `${fixed(s * 1e6, 0)} µs` : s > 0 ? (s < 0.01 ? `${fixed(s * 1e3, 2)} ms` : seconds(s).join(" ")) : "–");

    const drawBytes = (moved) => {
      const all = moved.reduce((a, b) => a + b, 0);
      const [scale, unit] = Math.max(...moved) >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
      const said = moved.map((v) => (v > 0 ? fixed(v / scale, v / scale >= 99.5 ? 0 : 1) : "0"));
      moved.forEach((v, i) => {
        parts[i].style.flexGrow = String(v);
        parts[i].classList.toggle("none", !(v > 0));
        text(keys[i], said[i]);
      });
      at.aheadbar.classList.toggle("on", all > 0);
      text(at.aheadunit, `${unit}/token`);
      const label = `Copied ahead per token: in time ${said[0]}, late ${said[1]}, wasted ${said[2]} ${unit}`;
      if (at.aheadbar.getAttribute("aria-label") !== label) at.aheadbar.setAttribute("aria-label", label);
    };
    const drawPair = (label, value, change, pair, plain, none) => {
      text(label, pair?.label || plain);
      text(value, pair?.text || none);
      value.classList.toggle("none", !pair);
      text(change, pair?.change || "");
    };

    const draw = (view, s) => {
      if (!view) return;
      showSwitch(view);
      at.ahead.dataset.state = view.state;
      text(at.aheadsay, view.text);
      drawPair(at.triallabel, at.trial, at.trialchange, view.trial, "Engine's trials", "none yet");
      drawPair(at.switchlabel, at.switched, at.switchchange, view.switched, "Your switch", "not used yet");
      if (!s || view.state !== "working") return;
      drawBytes(s.prefetch_bytes_per_token);
      text(at.recall, percent(s.predictor_recall));
      text(at.precision, percent(s.predictor_precision));
      text(at.cost, duration(s.predictor_s_per_token));
      at.cost.title = s.token_s > 0 ? `${fixed((100 * s.predictor_s_per_token) / s.token_s, 2)} % of a token` : "";
    };
    return { draw };
  };

  /* In the settings: the same switch, and the button that forgets what was learned. */
  PreScope.learning = (element, props, trigger, watch) => {
    const showSwitch = PreScope.predictionSwitch(element.querySelector(".ps-switch"), trigger);
    const forget = element.querySelector(".ps-forget");
    const said = element.querySelector(".ps-said");
    const plain = forget.textContent;
    let disarming = 0;
    const disarm = () => {
      clearTimeout(disarming);
      forget.classList.remove("arm");
      text(forget, plain);
    };
    forget.addEventListener("click", () => {
      const again = forget.classList.contains("arm");
      disarm();
      text(said, "");
      if (again) { trigger("forget_learned", {}); return; }
      forget.classList.add("arm");
      text(forget, "Forget? Press again");
      disarming = setTimeout(disarm, ARM_MS);
    });
    forget.addEventListener("blur", disarm);
    PreScope.on("live", (tick) => { if (tick.prediction) showSwitch(tick.prediction); });
    watch("value", () => {
      text(said, props.value?.text || "");
      said.classList.toggle("bad", Boolean(props.value?.bad));
    });
  };
})();
