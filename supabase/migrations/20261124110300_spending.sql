-- The surface around the proxy: what a key, an account and a request look like from outside, what a request would be granted, users' own
-- upstream keys, budgets of their customers, webhooks and their deliveries, and our books beside the upstream's.

create index usage_records_byok_idx on public.usage_records (key_id, created_at) where byok;
comment on index public.usage_records_byok_idx is
    'What was sent with users'' own keys is summed up nowhere else. It mentions only what admission writes once, so updates stay heap-only.';

-- A replaced secret signs beside its successor for a while, so that a receiver need not change both at once.
alter table public.webhooks
    add column previous_encrypted_secret text check (length(previous_encrypted_secret) <= 2000),
    add column previous_valid_until timestamptz,
    add column disabled_reason text check (length(disabled_reason) <= 500),
    add constraint webhooks_previous_has_end check ((previous_encrypted_secret is null) = (previous_valid_until is null));
comment on column public.webhooks.disabled_reason is 'Why the gateway switched it off (410 Gone); null when the user did.';

-- A delivery without an event is a test.
alter table public.webhook_deliveries alter column event_id drop not null;
create index webhook_deliveries_webhook_idx on public.webhook_deliveries (webhook_id, id desc);
create index webhook_deliveries_event_idx on public.webhook_deliveries (event_id);

-- What stays open in the books: requests that were settled without a known cost, and those that cost more than was held. Noted off the
-- hot path, when their part of the journal is closed; what is not closed is looked at as it stands.
create table public.open_items (
    request_id uuid primary key references public.usage_records (request_id),
    noted_at timestamptz not null default clock_timestamp()
);
comment on table public.open_items is 'Settled requests without a known cost, or above their hold. Ids are UUIDv7: they sort by time.';
alter table public.open_items enable row level security;
revoke all on public.open_items from public, anon, authenticated, service_role;
grant select, insert on public.open_items to service_role;
create table public.open_items_state (
    singleton boolean primary key default true check (singleton),
    noted_until timestamptz not null default '-infinity'
);
comment on table public.open_items_state is 'One row: the journal before noted_until has been looked through.';
insert into public.open_items_state default values;
alter table public.open_items_state enable row level security;
revoke all on public.open_items_state from public, anon, authenticated, service_role;
grant select, insert, update on public.open_items_state to service_role;

-- A key, an account and a request, as their owner sees them.

-- What a key has been charged, in all and in the UTC day, week and month, and what its requests cost that were sent with the user's own key.
create function public.key_usage(p_user_id bigint, p_key_id bigint) returns jsonb language sql stable set search_path = '' as $$
    with starts as (
        select date_trunc('day', t)::date as today, date_trunc('week', t)::date as week, date_trunc('month', t)::date as month
        from (select now() at time zone 'UTC' as t) as n
    ), days as (
        select d.day, d.cost_nanos from public.usage_days d where d.user_id = p_user_id and d.key_id = p_key_id
        union all
        select (s.slot at time zone 'UTC')::date, s.cost_nanos
        from public.count_usage(p_user_id, (select summed_until from public.usage_sums_state), 'infinity') s where s.key_id = p_key_id
    ), own as (
        select (r.created_at at time zone 'UTC')::date as day, coalesce(r.upstream_cost_nanos, 0) as cost_nanos
        from public.usage_records r where r.key_id = p_key_id and r.byok
    )
    select jsonb_build_object(
        'usage_nanos', coalesce(sum(a.charged), 0), 'usage_daily_nanos', coalesce(sum(a.charged) filter (where a.day >= s.today), 0),
        'usage_weekly_nanos', coalesce(sum(a.charged) filter (where a.day >= s.week), 0),
        'usage_monthly_nanos', coalesce(sum(a.charged) filter (where a.day >= s.month), 0),
        'byok_usage_nanos', coalesce(sum(a.own), 0), 'byok_usage_daily_nanos', coalesce(sum(a.own) filter (where a.day >= s.today), 0),
        'byok_usage_weekly_nanos', coalesce(sum(a.own) filter (where a.day >= s.week), 0),
        'byok_usage_monthly_nanos', coalesce(sum(a.own) filter (where a.day >= s.month), 0))
    from starts s left join (
        select d.day, d.cost_nanos as charged, 0 as own from days d union all select o.day, 0, o.cost_nanos from own o) as a on true
$$;
revoke all on function public.key_usage(bigint, bigint) from public, anon, authenticated;
grant execute on function public.key_usage(bigint, bigint) to service_role;

-- A key with what it has used, its tightest limit on requests, and whether its account is on the free plan; null for somebody else's.
create function public.read_key(p_user_id bigint, p_key_id bigint) returns jsonb language sql stable set search_path = '' as $$
    select public.key_view(k) || public.key_usage(p_user_id, p_key_id) || jsonb_build_object(
        'budget_held_nanos', coalesce((select g.budget_held_nanos from public.rate_limit_usage g
                                       where g.subject = 'key' and g.subject_id = k.id), 0),
        'requests_per_minute', (
            select min(c.requests_per_minute) from public.rate_limit_configs c
            where (c.subject, c.subject_id) in (('key', k.id), ('user', u.id))
               or (c.subject = 'default' and not exists (select from public.rate_limit_configs o
                                                         where o.subject = 'user' and o.subject_id = u.id))),
        'is_free_tier', (select p.slug = 'free' from public.current_plan(u, now()) as p))
    from public.api_keys_new k join public.users u on u.id = k.user_id
    where k.id = p_key_id and k.user_id = p_user_id and k.revoked_at is null
$$;
revoke all on function public.read_key(bigint, bigint) from public, anon, authenticated;
grant execute on function public.read_key(bigint, bigint) to service_role;

-- What an account was given in all, and its balance, of one moment. Refunds are no gift: they take back what was charged.
create function public.read_credits(p_user_id bigint) returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object('balance_nanos', u.credits_nanos, 'granted_nanos', coalesce((
        select sum(t.amount_nanos) from public.credit_transactions t where t.user_id = u.id and t.kind <> 'refund'), 0))
    from public.users u where u.id = p_user_id
$$;
revoke all on function public.read_credits(bigint) from public, anon, authenticated;
grant execute on function public.read_credits(bigint) to service_role;

-- A request of this user with the refunds of it, or null.
create function public.read_receipt(p_user_id bigint, p_request_id uuid) returns jsonb language sql stable set search_path = '' as $$
    -- The markup as text: as a JSON number it would be read as a float.
    select to_jsonb(r) || jsonb_build_object('markup', r.markup::text, 'refunds', (
        select coalesce(jsonb_agg(jsonb_build_object('transaction_id', t.id, 'amount_nanos', t.amount_nanos, 'reason', t.reason,
                                                     'balance_after_nanos', t.balance_after_nanos, 'created_at', t.created_at)
                                  order by t.id), '[]')
        from public.credit_transactions t where t.request_id = r.request_id))
    from public.usage_records r where r.request_id = p_request_id and r.user_id = p_user_id
$$;
revoke all on function public.read_receipt(bigint, uuid) from public, anon, authenticated;
grant execute on function public.read_receipt(bigint, uuid) to service_role;

-- A user's newest request with this generation id, or null. No index may hold what settlement writes, so it is looked for among what the
-- user asked for around p_around (a minute, then a quarter of an hour either way), or, where the id names no time, in the last day: at
-- most 50,000 requests each time.
create function public.find_generation(p_user_id bigint, p_generation_id text, p_around timestamptz) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
    v_width interval;
    v_found jsonb;
begin
    foreach v_width in array case when p_around is null then array[interval '1 day'] else array[interval '1 minute', interval '15 minutes'] end
    loop
        select to_jsonb(r) into v_found from (
            select * from public.usage_records n
            where n.user_id = p_user_id and n.created_at >= coalesce(p_around, clock_timestamp()) - v_width
              and n.created_at <= coalesce(p_around, clock_timestamp()) + v_width
            order by n.created_at desc limit 50000) as r
        where r.generation_id = p_generation_id order by r.created_at desc limit 1;
        exit when v_found is not null;
    end loop;
    return v_found;
end $$;
revoke all on function public.find_generation(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.find_generation(bigint, text, timestamptz) to service_role;

-- What this end user's budget is and what is used of it in the present window; null where none applies.
create function public.end_user_standing(p_user_id bigint, p_end_user text, p_now timestamptz) returns jsonb
language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'end_user', p_end_user, 'budget_id', b.id, 'budget_end_user', b.end_user, 'budget_nanos', b.budget_nanos,
        'budget_window', b.budget_window, 'window_start', nullif(public.budget_start(b.budget_window, p_now), '-infinity'),
        'spent_nanos', case when u.budget_since >= public.budget_start(b.budget_window, p_now) then u.budget_spent_nanos else 0 end,
        'held_nanos', coalesce(u.budget_held_nanos, 0))
    from public.end_user_budgets b
    left join public.end_user_usage u on u.user_id = p_user_id and u.end_user = p_end_user
    where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1
$$;
revoke all on function public.end_user_standing(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.end_user_standing(bigint, text, timestamptz) to service_role;

-- What admission would say to this request now, as far as money and the lasting rules go; nothing is counted, held or locked.
-- p: user_id, key_id, models, end_user, and the amounts of an admission_item. Rate limits are not looked at: they are gone in a moment.
-- Outcomes: granted, credits, budget, end_user_budget, MODEL_NOT_ALLOWED, REQUEST_LIMIT_EXCEEDED, trial_expired, not_found.
create function public.quote_request(p jsonb) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_item public.admission_item := jsonb_populate_record(null::public.admission_item, p - 'user_id' - 'key_id');
    v_user public.users;
    v_key public.api_keys_new;
    v_plan public.plans;
    v_usage public.rate_limit_usage;
    v_available bigint;
    v_budget bigint;
    v_end_user jsonb;
    v_end_user_left bigint;
    v_least bigint;
    v_granted bigint;
    v_byok boolean;
begin
    select * into v_user from public.users where id = (p ->> 'user_id')::bigint;
    select * into v_key from public.api_keys_new where id = (p ->> 'key_id')::bigint and user_id = v_user.id;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_plan := public.current_plan(v_user, v_now);
    select * into v_usage from public.rate_limit_usage where subject = 'key' and subject_id = v_key.id;
    v_usage := public.advance_usage(v_usage, v_now, v_key.budget_window);
    v_byok := exists (select from public.provider_keys k where k.user_id = v_user.id and k.is_active);
    if not public.models_allowed(v_key.allowed_models, v_item.models) or not public.models_allowed(v_plan.allowed_models, v_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif v_usage.requests_used >= v_key.max_requests then
        return jsonb_build_object('outcome', 'REQUEST_LIMIT_EXCEEDED');
    elsif v_key.environment_tag = 'test' then
        return jsonb_build_object('outcome', 'granted', 'granted_output', v_item.max_output, 'hold_nanos', 0, 'byok', false, 'free', true);
    elsif v_user.subscription_status = 'trial' and v_user.trial_expires_at <= v_now then
        return jsonb_build_object('outcome', 'trial_expired');
    elsif v_byok then
        return jsonb_build_object('outcome', 'granted', 'granted_output', v_item.max_output, 'hold_nanos', 0, 'byok', true, 'free', false);
    end if;
    v_available := v_user.credits_nanos - v_user.held_nanos;
    v_budget := v_key.budget_nanos - coalesce(v_usage.budget_spent_nanos + v_usage.budget_held_nanos, 0);
    v_end_user := public.end_user_standing(v_user.id, p ->> 'end_user', v_now);
    v_end_user_left := (v_end_user ->> 'budget_nanos')::bigint - (v_end_user ->> 'spent_nanos')::bigint - (v_end_user ->> 'held_nanos')::bigint;
    v_least := greatest(0, least(v_available, v_budget, v_end_user_left));
    v_granted := public.affordable_output(v_item, v_least);
    return jsonb_build_object(
        'outcome', case when v_granted >= v_item.min_output then 'granted' when v_end_user_left < least(v_available, v_budget) then 'end_user_budget'
                        when v_budget < v_available then 'budget' else 'credits' end,
        'granted_output', greatest(0, v_granted), 'available_nanos', v_least, 'byok', false, 'free', false,
        'hold_nanos', ceil((v_item.fixed_nanos + v_item.output_nanos * greatest(v_granted, v_item.min_output)) * v_item.markup));
end $$;
revoke all on function public.quote_request(jsonb) from public, anon, authenticated;
grant execute on function public.quote_request(jsonb) to service_role;

-- Users' own upstream keys. Orders hold user_id, maker_id and the stamp of whoever acts.

-- Of a URL only where it leads to: path and query often are a secret, and the log is for ever.
create function public.audit_order(p jsonb, p_action text, p_target text, p_user_id bigint, p_details jsonb) returns void
language sql set search_path = '' as $$
    select public.write_audit(
        p ->> 'actor', p_action, p_target, p_user_id, (p ->> 'maker_id')::bigint, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid,
        case when p_details ? 'url' then jsonb_set(p_details, '{url}', to_jsonb(substring(p_details ->> 'url' from '^https://[^/?#]*')))
             else p_details end)
$$;
revoke all on function public.audit_order(jsonb, text, text, bigint, jsonb) from public, anon, authenticated;
grant execute on function public.audit_order(jsonb, text, text, bigint, jsonb) to service_role;

-- The user who gives an order, locked; null where the account or the key that acts has gone since it was verified.
create function public.lock_orderer(p jsonb) returns bigint language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
begin
    return case when v_maker.user_id = v_user.id then v_user.id end;
end $$;
revoke all on function public.lock_orderer(jsonb) from public, anon, authenticated;
grant execute on function public.lock_orderer(jsonb) to service_role;

-- p: encrypted_key, label. Outcomes: set, not_found.
create function public.set_provider_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_key public.provider_keys;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    insert into public.provider_keys as k (user_id, encrypted_key, label) values (v_user_id, p ->> 'encrypted_key', p ->> 'label')
    on conflict (user_id) do update set encrypted_key = excluded.encrypted_key, label = excluded.label, is_active = true,
                                        updated_at = clock_timestamp()
    returning * into v_key;
    perform public.audit_order(p, 'set_provider_key', 'user:' || v_user_id, v_user_id, jsonb_build_object('label', v_key.label));
    return jsonb_build_object('outcome', 'set', 'label', v_key.label, 'is_active', v_key.is_active, 'created_at', v_key.created_at,
                              'updated_at', v_key.updated_at);
end $$;
revoke all on function public.set_provider_key(jsonb) from public, anon, authenticated;
grant execute on function public.set_provider_key(jsonb) to service_role;

-- Outcomes: deleted, not_found.
create function public.delete_provider_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_label text;
begin
    delete from public.provider_keys where user_id = v_user_id returning label into v_label;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_provider_key', 'user:' || v_user_id, v_user_id, jsonb_build_object('label', v_label));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_provider_key(jsonb) from public, anon, authenticated;
grant execute on function public.delete_provider_key(jsonb) to service_role;

-- Budgets of a user's customers.

-- The budgets, newest first, each with how its end user stands now; that of '*' is each one's own, so it shows nothing spent.
create function public.list_end_user_budgets(p_user_id bigint, p_before bigint, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.end_user_standing(p_user_id, b.end_user, now())
                              || jsonb_build_object('created_at', b.created_at, 'updated_at', b.updated_at) order by b.id desc), '[]')
    from (select * from public.end_user_budgets n where n.user_id = p_user_id and (p_before is null or n.id < p_before)
          order by n.id desc limit p_limit) as b
$$;
revoke all on function public.list_end_user_budgets(bigint, bigint, int) from public, anon, authenticated;
grant execute on function public.list_end_user_budgets(bigint, bigint, int) to service_role;

-- p: end_user, budget_nanos, budget_window. Outcomes: created, name_taken, too_many, not_found.
create function public.create_end_user_budget(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif exists (select from public.end_user_budgets b where b.user_id = v_user_id and b.end_user = p ->> 'end_user') then
        return jsonb_build_object('outcome', 'name_taken');
    elsif (select count(*) from public.end_user_budgets b where b.user_id = v_user_id) >= 10000 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    insert into public.end_user_budgets (user_id, end_user, budget_nanos, budget_window)
    values (v_user_id, p ->> 'end_user', (p ->> 'budget_nanos')::bigint, p ->> 'budget_window') returning * into v_budget;
    perform public.audit_order(p, 'create_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id, to_jsonb(v_budget) - 'user_id');
    return public.end_user_standing(v_user_id, v_budget.end_user, clock_timestamp())
        || jsonb_build_object('outcome', 'created', 'created_at', v_budget.created_at, 'updated_at', v_budget.updated_at);
end $$;
revoke all on function public.create_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.create_end_user_budget(jsonb) to service_role;

-- p: budget_id, changes {budget_nanos, budget_window}. Outcomes: updated, not_found.
create function public.update_end_user_budget(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    update public.end_user_budgets b set
        budget_nanos = coalesce((p -> 'changes' ->> 'budget_nanos')::bigint, b.budget_nanos),
        budget_window = coalesce(p -> 'changes' ->> 'budget_window', b.budget_window), updated_at = clock_timestamp()
    where b.id = (p ->> 'budget_id')::bigint and b.user_id = v_user_id returning * into v_budget;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'update_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id, to_jsonb(v_budget) - 'user_id');
    return public.end_user_standing(v_user_id, v_budget.end_user, clock_timestamp())
        || jsonb_build_object('outcome', 'updated', 'created_at', v_budget.created_at, 'updated_at', v_budget.updated_at);
end $$;
revoke all on function public.update_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.update_end_user_budget(jsonb) to service_role;

-- p: budget_id. Outcomes: deleted, not_found.
create function public.delete_end_user_budget(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    delete from public.end_user_budgets b where b.id = (p ->> 'budget_id')::bigint and b.user_id = v_user_id returning * into v_budget;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id,
                               jsonb_build_object('end_user', v_budget.end_user));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.delete_end_user_budget(jsonb) to service_role;

-- Webhooks, and the deliveries of them.

create function public.webhook_view(p_webhook public.webhooks) returns jsonb language sql stable set search_path = '' as $$
    select to_jsonb(p_webhook) - 'user_id' - 'encrypted_secret' - 'previous_encrypted_secret'
$$;
revoke all on function public.webhook_view(public.webhooks) from public, anon, authenticated;
grant execute on function public.webhook_view(public.webhooks) to service_role;

-- p: url, encrypted_secret. Outcomes: created, too_many, not_found.
create function public.create_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_webhook public.webhooks;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif (select count(*) from public.webhooks w where w.user_id = v_user_id) >= 5 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    insert into public.webhooks (user_id, url, encrypted_secret) values (v_user_id, p ->> 'url', p ->> 'encrypted_secret')
    returning * into v_webhook;
    perform public.audit_order(p, 'create_webhook', 'webhook:' || v_webhook.id, v_user_id, jsonb_build_object('url', v_webhook.url));
    return public.webhook_view(v_webhook) || jsonb_build_object('outcome', 'created');
end $$;
revoke all on function public.create_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.create_webhook(jsonb) to service_role;

-- p: webhook_id, changes {url, is_active, encrypted_secret}; a replaced secret signs for grace_seconds more. Outcomes: updated, not_found.
create function public.update_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_changes jsonb := p -> 'changes';
    v_now timestamptz := clock_timestamp();
    v_rotates boolean := v_changes ? 'encrypted_secret';
    v_webhook public.webhooks;
begin
    update public.webhooks w set
        url = coalesce(v_changes ->> 'url', w.url),
        is_active = coalesce((v_changes ->> 'is_active')::boolean, w.is_active),
        disabled_reason = case when v_changes ? 'is_active' then null else w.disabled_reason end,
        encrypted_secret = coalesce(v_changes ->> 'encrypted_secret', w.encrypted_secret),
        previous_encrypted_secret = case when v_rotates then w.encrypted_secret else w.previous_encrypted_secret end,
        previous_valid_until = case when v_rotates then v_now + make_interval(secs => (p ->> 'grace_seconds')::int)
                                    else w.previous_valid_until end,
        updated_at = v_now
    where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id returning * into v_webhook;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'update_webhook', 'webhook:' || v_webhook.id, v_user_id, jsonb_build_object(
        'fields', (select jsonb_agg(case f when 'encrypted_secret' then 'secret' else f end) from jsonb_object_keys(v_changes) as f),
        'url', v_webhook.url));
    return public.webhook_view(v_webhook) || jsonb_build_object('outcome', 'updated');
end $$;
revoke all on function public.update_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.update_webhook(jsonb) to service_role;

-- p: webhook_id. Its deliveries go with it. Outcomes: deleted, not_found.
create function public.delete_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_url text;
begin
    delete from public.webhooks w where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id returning w.url into v_url;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_webhook', 'webhook:' || (p ->> 'webhook_id'), v_user_id, jsonb_build_object('url', v_url));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.delete_webhook(jsonb) to service_role;

-- p: webhook_id. One test a minute of each. Outcomes: queued, too_soon, inactive, not_found.
create function public.queue_webhook_test(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_webhook public.webhooks;
    v_last timestamptz;
    v_id bigint;
begin
    select * into v_webhook from public.webhooks w where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    elsif not v_webhook.is_active then
        return jsonb_build_object('outcome', 'inactive');
    end if;
    select max(d.created_at) into v_last from public.webhook_deliveries d
    where d.webhook_id = v_webhook.id and d.event_id is null and d.created_at > clock_timestamp() - interval '1 minute';
    if v_last is not null then
        return jsonb_build_object('outcome', 'too_soon', 'retry_after',
                                  ceil(extract(epoch from v_last + interval '1 minute' - clock_timestamp()))::int);
    end if;
    insert into public.webhook_deliveries (webhook_id, user_id) values (v_webhook.id, v_user_id) returning id into v_id;
    return jsonb_build_object('outcome', 'queued', 'delivery_id', v_id);
end $$;
revoke all on function public.queue_webhook_test(jsonb) from public, anon, authenticated;
grant execute on function public.queue_webhook_test(jsonb) to service_role;

-- Deliveries that are due (or just one of them), for whoever asked first: nobody else gets them before the lease ends, and only a crash
-- lets it end. What is due for a webhook that is switched off has failed.
create function public.claim_deliveries(p_limit int, p_lease_seconds int, p_delivery_id bigint) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_claimed jsonb;
begin
    update public.webhook_deliveries d set failed_at = v_now, last_error = 'the webhook is switched off'
    where d.id in (
        select n.id from public.webhook_deliveries n join public.webhooks w on w.id = n.webhook_id
        where n.delivered_at is null and n.failed_at is null and n.next_attempt_at <= v_now and not w.is_active
        limit 1000 for update of n skip locked);
    -- The first of each webhook before the second of any: one that never answers must not keep the others waiting.
    with ranked as (
        select n.id, row_number() over (partition by n.webhook_id order by n.next_attempt_at, n.id) as place
        from public.webhook_deliveries n
        where n.delivered_at is null and n.failed_at is null and n.next_attempt_at <= v_now and (p_delivery_id is null or n.id = p_delivery_id)
    ), due as (
        select d.id from public.webhook_deliveries d join ranked r on r.id = d.id
        where d.delivered_at is null and d.failed_at is null and d.next_attempt_at <= v_now
        order by r.place, d.next_attempt_at limit p_limit for update of d skip locked
    ), claimed as (
        update public.webhook_deliveries d set attempts = d.attempts + 1, next_attempt_at = v_now + make_interval(secs => p_lease_seconds)
        from due where d.id = due.id returning d.*
    )
    select coalesce(jsonb_agg(jsonb_build_object(
        'id', c.id, 'attempts', c.attempts, 'created_at', c.created_at, 'webhook_id', w.id, 'url', w.url,
        'encrypted_secret', w.encrypted_secret,
        'previous_encrypted_secret', case when w.previous_valid_until > v_now then w.previous_encrypted_secret end,
        'event', case when e.id is not null then to_jsonb(e) end) order by c.id), '[]') into v_claimed
    from claimed c join public.webhooks w on w.id = c.webhook_id left join public.budget_events e on e.id = c.event_id;
    return v_claimed;
end $$;
revoke all on function public.claim_deliveries(int, int, bigint) from public, anon, authenticated;
grant execute on function public.claim_deliveries(int, int, bigint) to service_role;

-- p: id, attempt, status, error, delivered, gone (the receiver wants no more: the webhook is switched off), retry_seconds (null: it was the
-- last attempt). Outcomes: finished, stale (the lease ended and somebody else has it).
create function public.finish_delivery(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_retry int := (p ->> 'retry_seconds')::int;
    v_delivered boolean := (p ->> 'delivered')::boolean;
    v_gone boolean := (p ->> 'gone')::boolean;
    v_webhook_id bigint;
begin
    if v_gone then -- which changes the webhook too: first the user, as everybody does
        perform from public.users u
        where u.id = (select d.user_id from public.webhook_deliveries d where d.id = (p ->> 'id')::bigint) for no key update;
    end if;
    update public.webhook_deliveries d set
        delivered_at = case when v_delivered then v_now end,
        failed_at = case when not v_delivered and (v_gone or v_retry is null) then v_now end,
        next_attempt_at = case when v_delivered or v_retry is null then d.next_attempt_at else v_now + make_interval(secs => v_retry) end,
        last_status = (p ->> 'status')::int, last_error = left(p ->> 'error', 500)
    where d.id = (p ->> 'id')::bigint and d.attempts = (p ->> 'attempt')::int and d.delivered_at is null and d.failed_at is null
    returning d.webhook_id into v_webhook_id;
    if not found then
        return jsonb_build_object('outcome', 'stale');
    end if;
    if v_gone then
        update public.webhooks w set is_active = false, disabled_reason = 'the receiver answered 410 Gone', updated_at = v_now
        where w.id = v_webhook_id and w.is_active;
    end if;
    return jsonb_build_object('outcome', 'finished');
end $$;
revoke all on function public.finish_delivery(jsonb) from public, anon, authenticated;
grant execute on function public.finish_delivery(jsonb) to service_role;

-- Our books beside the upstream's.

-- What live requests that were admitted since p_start have cost, as far as they are settled: test requests, play money and requests with
-- users' own keys are not the operator's bill.
create function public.live_costs(p_start timestamptz) returns jsonb language sql stable set search_path = '' as $$
    with bounds as (
        select g.mode, g.live_from, s.summed_until,
               date_bin('15 minutes', g.live_from + interval '15 minutes' - interval '1 microsecond', '2000-01-01 00:00:00+00') as whole_from
        from (select mode, case when mode = 'live' then greatest(p_start, mode_since) else p_start end as live_from
              from public.gateway_state) as g, public.usage_sums_state s
    ), parts as (
        select t.requests, t.upstream_cost_nanos, t.cost_nanos, t.overrun_nanos
        from public.usage_totals t, bounds b
        where t.slot >= b.whole_from and t.slot < b.summed_until and t.environment <> 'test'
        union all -- what stands in those sums and is not the operator's bill (of its upstream cost they know nothing)
        select -1, 0, -r.cost_nanos, -r.overrun_nanos
        from public.usage_records r, bounds b
        where r.byok and r.created_at >= b.whole_from and r.created_at < b.summed_until and r.status <> 'pending' and r.environment <> 'test'
        union all -- the rest of a quarter of an hour in which the database went live, and what is not summed up yet
        select 1, coalesce(r.upstream_cost_nanos, 0), r.cost_nanos, r.overrun_nanos
        from public.usage_records r, bounds b
        where (r.created_at >= b.live_from and r.created_at < least(b.whole_from, b.summed_until)
               or r.created_at >= greatest(b.live_from, b.summed_until))
          and r.mode = b.mode and r.status <> 'pending' and r.environment <> 'test' and not r.byok
    )
    select jsonb_build_object('start', p_start, 'requests', coalesce(sum(requests), 0), 'upstream_cost_nanos', coalesce(sum(upstream_cost_nanos), 0),
                              'charged_nanos', coalesce(sum(cost_nanos), 0), 'overrun_nanos', coalesce(sum(overrun_nanos), 0))
    from parts
$$;
revoke all on function public.live_costs(timestamptz) from public, anon, authenticated;
grant execute on function public.live_costs(timestamptz) to service_role;

-- The UTC day, week and month.
create function public.reconcile_costs() returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object('mode', (select mode from public.gateway_state), 'daily', public.live_costs(date_trunc('day', now(), 'UTC')),
                              'weekly', public.live_costs(date_trunc('week', now(), 'UTC')),
                              'monthly', public.live_costs(date_trunc('month', now(), 'UTC')))
$$;
revoke all on function public.reconcile_costs() from public, anon, authenticated;
grant execute on function public.reconcile_costs() to service_role;

-- Notes the open items of that part of the journal that is closed (all of whose requests are settled), once.
create function public.note_open_items() returns void language plpgsql set search_path = '' as $$
declare
    v_from timestamptz;
    v_until timestamptz := (select summed_until from public.usage_sums_state);
begin
    select noted_until into v_from from public.open_items_state for update skip locked;
    if not found or v_from >= v_until then
        return;
    end if;
    insert into public.open_items (request_id)
    select r.request_id from public.usage_records r
    where r.created_at >= v_from and r.created_at < v_until and r.status <> 'pending'
      and (r.settlement_source = 'none' or r.overrun_nanos > 0)
    on conflict do nothing;
    update public.open_items_state set noted_until = v_until where singleton;
end $$;
revoke all on function public.note_open_items() from public, anon, authenticated;
grant execute on function public.note_open_items() to service_role;

-- p_kind: expired (pending beyond their hold's time), unknown (settled without a known cost), overrun (cost more than could be charged).
-- Newest first; p_before is the id of the last one seen.
create function public.list_open_items(p_kind text, p_before uuid, p_limit int) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(x) order by x.request_id desc), '[]') from (
        select r.request_id, r.user_id, r.key_id, r.mode, r.environment, r.byok, r.endpoint, r.model, r.model_used, r.provider, r.status,
               r.settlement_source, r.error_code, r.generation_id, r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos, r.overrun_nanos,
               r.created_at, r.expires_at, r.settled_at
        from (
            select n.* from public.usage_records n
            where p_kind = 'expired' and n.expires_at >= (select swept_until from public.gateway_state) and n.expires_at <= now()
              and n.status = 'pending'
            union all
            select n.* from public.open_items i join public.usage_records n on n.request_id = i.request_id
            where p_kind <> 'expired' and (p_before is null or i.request_id < p_before)
            union all
            select n.* from public.usage_records n
            where p_kind <> 'expired' and n.created_at >= (select noted_until from public.open_items_state) and n.status <> 'pending'
        ) as r
        where (p_before is null or r.request_id < p_before)
          and case p_kind when 'unknown' then r.settlement_source = 'none' when 'overrun' then r.overrun_nanos > 0 else true end
        order by r.request_id desc limit p_limit) as x
$$;
revoke all on function public.list_open_items(text, uuid, int) from public, anon, authenticated;
grant execute on function public.list_open_items(text, uuid, int) to service_role;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110300::bigint
$$;

notify pgrst, 'reload schema';
