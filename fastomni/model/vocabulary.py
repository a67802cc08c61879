"""Everyday words that the tiny preset's tokenizers know besides the demo's own texts.

They fill the byte-level BPE up to about a thousand tokens, so that labels of other sets (MAFW,
RAVDESS) and a user's own questions are words to the model and not strings of bytes.
"""

from __future__ import annotations

TEXT = """
happy surprise neutral angry disgust sad fear contemptuous disappointed helpless anxious calm
fearful surprised happiness sadness anger contempt disappointment helplessness anxiety joy bored
tired excited nervous proud ashamed relieved worried curious confused amused lonely gentle afraid
emotion feeling mood expression person people man woman child girl boy speaker listener character
head hair forehead eyebrow eyebrows eyelids cheek cheeks nose lips teeth tongue chin jaw neck
shoulder shoulders hand hands finger arm body posture gesture gaze look looks looking looked smile
smiles smiled frown frowns frowned laugh laughs laughing cry cries crying tears blink blinks stare
stares open opens opened close closes closed tight tightly loose loosely wide widely narrow raise
raises raised lower lowers lowered pull pulls pulled press presses pressed curve curved turn turns
turned lean leans leaning shake shakes shaking tremble trembles trembling relax relaxed tense still
voice sound sounds speech word words tone pitch pace tempo rhythm volume loudness energy breath
whisper shout shouts sigh sighs pause pauses silence silent quiet quietly loud loudly soft softly
high higher low lower fast faster slow slower steady shaky warm cold bright dark heavy light sharp
flat rising falling before after while when then because therefore although however perhaps maybe
clearly slightly strongly very quite rather almost entirely mostly often always never sometimes
video audio clip scene frame picture image camera background music noise subtitle text question
answer output thinking process final reason explain describe observe notice suggest suggests
indicate indicates show shows shown seem seems appear appears hear heard hears see seen sees feel
feels felt think thinks thought say says said tell tells speak speaks spoke talk talks talked
this that these those which what who whose where with without from into between about against
during there their they them have has had was were been being would could should might must can
cannot does did not only also both either neither each every another other same different more most
less least first second third last next one two three four five six seven eight nine ten
"""
